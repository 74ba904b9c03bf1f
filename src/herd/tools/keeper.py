"""Run a program, and end everything that it started once it ends or once this process's parent is gone.

`stdio_server.py` starts it as ``python -I -S keeper.py PARENT COMMAND ARGUMENTS…``. On Linux it adopts
orphans, so a program cannot leave processes behind, also not in process groups and sessions of their own. If
the parent is killed with SIGKILL, the kernel tells this process. Elsewhere the process group of the program
is killed.
"""

import contextlib
import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
NOT_STARTED = 127


def control(option, value):
    """Call prctl if the system has it."""
    if sys.platform == "linux":
        zero = ctypes.c_ulong(0)
        ctypes.CDLL(None).prctl(option, ctypes.c_ulong(value), zero, zero, zero)


def start(command):
    """Start the program in a session of its own and return its process id."""
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setsid()
        control(PR_SET_PDEATHSIG, int(signal.SIGKILL))
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.execvp(command[0], command)
    except OSError as error:
        os.write(2, f"{command[0]}: {error.strerror}\n".encode())
    finally:
        os._exit(NOT_STARTED)


def children():
    """Return the ids of this process's children, adopted ones included."""
    try:
        with open(f"/proc/self/task/{os.getpid()}/children") as file:
            return [int(word) for word in file.read().split()]
    except OSError:
        return []


def end_all(pid):
    """Kill the program and all of its descendants, and wait for them."""
    while True:
        for number, kill in ((pid, os.killpg), *((child, os.kill) for child in children())):
            with contextlib.suppress(OSError):  # it has ended
                kill(number, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def main():
    """Run the program until it ends or SIGTERM arrives."""
    parent, *command = sys.argv[1:]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    control(PR_SET_CHILD_SUBREAPER, 1)
    control(PR_SET_PDEATHSIG, int(signal.SIGTERM))
    pid = start(command)
    try:
        if os.getppid() != int(parent):  # it died before the kernel was asked to tell
            return
        nothing = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1):  # only the program has the pipes
            os.dup2(nothing, stream)
        while os.waitpid(-1, 0)[0] != pid:
            pass
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        end_all(pid)


main()
