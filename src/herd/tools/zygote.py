"""The sandbox's helper: a small process, without the rest of Herd, that forks for every program.

`sandbox.py` starts it as ``python -S -P zygote.py FD FOLDER``. It first leaves the machine's network and
mounts if the kernel allows that. Then it serves requests on the socket FD: fork, lock the child, run, report.
The child is locked by

- *resource limits*: address space, CPU seconds, file size, open files, processes, no core file;
- *Landlock* (Linux 5.13+): the child reads only Python's own library and writes only in the program's folder;
- *seccomp*: a list of harmless system calls; all others (sockets, processes, signals, ptrace, …) fail;
- *an audit hook* for Python's own events, used only if one of the kernel's locks is missing. Native code can
  evade it.

All of them are irreversible, are inherited by child processes, and need no privileges. The helper tries out
which of them work, and names them in every result.

Sources: landlock(7), seccomp(2), ``include/uapi/linux/{landlock,seccomp,filter}.h``.
"""

import contextlib
import ctypes
import gc
import json
import os
import platform
import resource
import select
import shutil
import signal
import socket
import struct
import sys
import tempfile
import time
import traceback

# The modules that programs import most are loaded once, before the forks.
_COMMON = ("collections", "datetime", "functools", "itertools", "math", "random", "re", "string", "typing")
for _name in _COMMON:
    __import__(_name)

FOLDER_BYTES, FOLDER_FILES = 16 << 20, 1024
FILE_BYTES = 1 << 20  # limit of one file, used if no small file system limits all files together
OPEN_FILES = 64
SETUP_FAILED = 97

CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWNET = 0x20000, 0x8000000, 0x10000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_REC, MS_PRIVATE, MNT_DETACH = 0x2, 0x4, 0x4000, 0x40000, 0x2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38

SYS_LANDLOCK = 444  # create_ruleset, add_rule, restrict_self: the same numbers on every machine


class Locks:
    """The kernel's locks, called with ctypes. Each method raises OSError if the kernel refuses."""

    def __init__(self):
        self.libc = ctypes.CDLL(None, use_errno=True)
        # by architecture: its AUDIT_ARCH value, then the allowed numbers
        self.syscalls: dict[str, list[int]] = {}
        with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "zygote_syscalls.txt")) as file:
            words = [word for line in file if not line.startswith("#") for word in line.split()]
        for word in words:
            if word[0].isalpha():
                numbers = self.syscalls[word] = []
            else:
                numbers.append(int(word, 0))

    def check(self, result):
        if result < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        return result

    def syscall(self, number, *arguments):
        return self.check(self.libc.syscall(ctypes.c_long(number), *arguments))

    def prctl(self, option, a=0, b=0):
        zero = ctypes.c_ulong(0)
        value = ctypes.c_ulong(a) if isinstance(a, int) else a
        return self.check(self.libc.prctl(option, value, b or zero, zero, zero))

    def namespaces(self):
        """Leave the machine's network and mounts, as the same user in a new user namespace."""
        uid, gid = os.getuid(), os.getgid()
        self.check(self.libc.unshare(CLONE_NEWUSER | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWNS))
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)

    def tmpfs(self, folder):
        """Mount a small file system in memory on ``folder``. Only this process and its children see it."""
        self.check(self.libc.mount(b"none", b"/", None, ctypes.c_ulong(MS_REC | MS_PRIVATE), None))
        options = f"size={FOLDER_BYTES},nr_inodes={FOLDER_FILES},mode=700".encode()
        flags = ctypes.c_ulong(MS_NOSUID | MS_NODEV)
        self.check(self.libc.mount(b"tmpfs", folder.encode(), b"tmpfs", flags, options))

    def landlock(self, readable, writable):
        """Allow reading below ``readable``, reading and writing below ``writable``, and no other files."""
        abi = self.syscall(SYS_LANDLOCK, None, ctypes.c_size_t(0), ctypes.c_uint32(1))
        handled = (1 << 13) - 1  # the accesses of the first version, to which later versions add
        handled |= sum(1 << bit for bit, since in ((13, 2), (14, 3), (15, 5)) if abi >= since)
        network, scope = (3 if abi >= 4 else 0), (3 if abi >= 6 else 0)
        attributes = struct.pack("QQQ", handled, network, scope)[: 8 if abi < 4 else 16 if abi < 6 else 24]
        ruleset = self.syscall(SYS_LANDLOCK, attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint32(0))
        read = 1 << 2 | 1 << 3  # read files, list folders
        make = sum(1 << bit for bit in (1, 4, 5, 7, 8, 13, 14))  # write, remove, make, rename, truncate
        for paths, access in ((readable, read), (writable, (read | make) & handled)):
            for path in paths:
                try:
                    handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
                except FileNotFoundError:
                    continue
                rule = struct.pack("=Qi", access, handle)
                self.syscall(SYS_LANDLOCK + 1, ruleset, ctypes.c_int(1), rule, ctypes.c_uint32(0))
                os.close(handle)
        self.syscall(SYS_LANDLOCK + 2, ruleset, ctypes.c_uint32(0))
        os.close(ruleset)

    def seccomp(self):
        """Allow the listed system calls.

        Others fail with EPERM. A call of another architecture kills the process.
        """
        arch, *numbers = self.syscalls[platform.machine()]
        load, equal, give = 0x20, 0x15, 0x06  # BPF: load a word, jump if equal, return
        program = [(load, 0, 0, 4), (equal, 1, 0, arch), (give, 0, 0, 0x80000000), (load, 0, 0, 0)]
        program += [(equal, len(numbers) - i, 0, number) for i, number in enumerate(numbers)]
        program += [(give, 0, 0, 0x00050000 | 1), (give, 0, 0, 0x7FFF0000)]  # EPERM, allow
        code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
        header = struct.pack("HxxxxxxQ", len(program), ctypes.addressof(code))
        self.prctl(PR_SET_SECCOMP, 2, header)


def limit(request, file_bytes):
    """Set resource limits, with at most ``file_bytes`` in one file. Lower limits that exist are kept."""
    wanted = {
        resource.RLIMIT_AS: request["memory_bytes"],
        resource.RLIMIT_CPU: int(request["timeout_s"]) + 1,
        resource.RLIMIT_FSIZE: file_bytes,
        resource.RLIMIT_NOFILE: OPEN_FILES,
        resource.RLIMIT_NPROC: 0,
        resource.RLIMIT_CORE: 0,
    }
    for number, value in wanted.items():
        hard = resource.getrlimit(number)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        try:
            resource.setrlimit(number, (value, value))
        except (ValueError, OSError):
            if number != resource.RLIMIT_AS or sys.platform == "linux":  # macOS cannot limit address space
                raise


def audit(folder):
    """Lock by Python's audit events: no sockets, no processes, and no files outside the folder."""
    roots = tuple(os.path.join(path, "") for path in {os.path.realpath(p) for p in (folder, *libraries())})
    inside = os.path.join(os.path.realpath(folder), "")
    refused = ("socket.", "subprocess.", "os.fork", "os.exec", "os.posix_spawn", "os.spawn", "os.system",
               "os.kill", "os.chmod", "os.chown", "os.link", "os.symlink", "os.putenv", "ctypes.", "pty.",
               "signal.", "os.setxattr", "os.utime", "fcntl.", "resource.", "syslog.")  # fmt: skip
    reading = ("os.listdir", "os.scandir", "os.chdir")
    writing = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.truncate")
    real, join, fsdecode, kinds = os.path.realpath, os.path.join, os.fsdecode, (str, bytes, os.PathLike)
    flags = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

    def below(path, allowed):
        path = "." if path is None else path
        return isinstance(path, kinds) and join(real(fsdecode(path)), "").startswith(allowed)

    def hook(event, arguments):
        if event.startswith(refused):
            raise PermissionError(f"sandbox: {event} is not allowed")
        if event == "open" and not isinstance(arguments[0], int):
            write = isinstance(arguments[2], int) and arguments[2] & flags
            if not below(arguments[0], inside if write else roots):
                raise PermissionError(f"sandbox: {arguments[0]!r} is outside the program's folder")
            return
        allowed = inside if event in writing else roots if event in reading else None
        paths = arguments[: 2 if event == "os.rename" else 1]
        if allowed and not all(below(path, allowed) for path in paths):
            raise PermissionError(f"sandbox: {event} outside the program's folder")

    sys.addaudithook(hook)


def libraries():
    """Return the folders of Python's own library, its shared libraries and the time zones."""
    own = [path for path in sys.path if path] + [os.path.dirname(os.__file__)]
    return [*own, os.path.join(sys.base_prefix, "lib"), "/lib", "/lib64", "/usr/lib", "/usr/lib64",
            "/usr/share/zoneinfo"]  # fmt: skip


def lock(locks, protections, request, folder):
    """Apply to this process every lock that is known to work here."""
    limit(request, FOLDER_BYTES if "tmpfs" in protections else FILE_BYTES)
    if "seccomp" in protections or "landlock" in protections:
        locks.prctl(PR_SET_NO_NEW_PRIVS, 1)
        locks.prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))
        locks.prctl(PR_SET_DUMPABLE, 0)
    if "audit" in protections:
        audit(folder)
    if "landlock" in protections:
        locks.landlock(libraries(), [folder])
    if "seccomp" in protections:
        locks.seccomp()


def execute(code):
    """Run a program in this process and return its exit status.

    Tracebacks begin at the program's first frame.
    """
    status = 0
    try:
        exec(compile(code, "<program>", "exec"), {"__name__": "__main__", "__builtins__": __builtins__})
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            status = (stop.code or 0) & 0xFF
        else:
            print(stop.code, file=sys.stderr)
            status = 1
    except BaseException as error:
        trace = error.__traceback__.tb_next if error.__traceback__ else None
        traceback.print_exception(type(error), error, trace)
        status = 1
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BaseException:
            status = status or 1
    return status


def child(locks, protections, request, folder, pipes):
    """Do the work of the forked process: set up the standard streams, lock, run the program.

    Never returns.
    """
    status = SETUP_FAILED
    try:
        os.setsid()
        os.chdir(folder)
        with tempfile.TemporaryFile(dir=folder) as given:
            given.write(request["stdin"].encode("utf-8", "surrogatepass"))
            given.seek(0)
            os.dup2(given.fileno(), 0)
        os.dup2(pipes[0], 1)
        os.dup2(pipes[1], 2)
        os.closerange(3, 4096)
        for number, name in enumerate(("stdin", "stdout", "stderr")):
            mode, errors = ("w", "replace") if number else ("r", "strict")
            stream = open(number, mode, encoding="utf-8", errors=errors)  # noqa: SIM115
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
        sys.argv = ["<program>"]
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        lock(locks, protections, request, folder)
        status = execute(request["code"])
    except BaseException:
        if status == SETUP_FAILED:
            os.write(2, traceback.format_exc().encode()[-2000:])
    finally:
        os._exit(status)


def run(locks, protections, request, root, control):
    """Fork for one program, read its output, end it at its limits, and return the reply for the caller."""
    folder = tempfile.mkdtemp(dir=root)
    out, err = os.pipe(), os.pipe()
    began = time.monotonic()
    pid = os.fork()
    if pid == 0:
        control.close()
        child(locks, protections, request, folder, (out[1], err[1]))
    os.close(out[1])
    os.close(err[1])
    try:
        outputs, reason = collect(pid, {out[0]: bytearray(), err[0]: bytearray()}, request, began, control)
        _, status = os.waitpid(pid, 0)
    finally:
        os.close(out[0])
        os.close(err[0])
        clean(folder)
    if reason is None and os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        name = {known.value: known.name for known in signal.Signals}.get(number, number)
        reason = "CPU time limit" if number == signal.SIGXCPU else f"killed by {name}"
    elif reason is None and os.WEXITSTATUS(status):
        failed = os.WEXITSTATUS(status) == SETUP_FAILED
        reason = "sandbox could not be set up" if failed else f"exit status {os.WEXITSTATUS(status)}"
    stdout, stderr = (bytes(outputs[fd]).decode("utf-8", "replace") for fd in (out[0], err[0]))
    return {"stdout": stdout, "stderr": stderr, "reason": reason or "", "seconds": time.monotonic() - began}


def collect(pid, outputs, request, began, control):
    """Read until both streams close. End the child at its limits, or when the caller is gone."""
    deadline, most = began + request["timeout_s"], request["output_bytes"]
    waiting, reason = set(outputs), None
    while waiting:
        rest = deadline - time.monotonic()
        ready = select.select([*waiting, control], [], [], max(0.0, rest))[0] if rest > 0 else []
        if control in ready and not control.recv(1, socket.MSG_PEEK):
            kill(pid)
            raise SystemExit  # the caller is gone, and `main` cleans up
        if rest <= 0:
            reason = f"time limit of {request['timeout_s']:g} s"
            break
        for fd in waiting.intersection(ready):
            data = os.read(fd, 65536)
            outputs[fd] += data[: most - len(outputs[fd])]
            if not data:
                waiting.discard(fd)
            elif len(outputs[fd]) >= most and len(data) > 0:
                reason = f"output limit of {most} bytes"
        if reason:
            break
    if reason:
        kill(pid)
    else:  # the program may still run after it closed both streams
        while not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            if time.monotonic() > deadline:
                reason = f"time limit of {request['timeout_s']:g} s"
                kill(pid)
                break
            time.sleep(0.0005)
    return outputs, reason


def kill(pid):
    """End the child and, if it could start processes, everything in its process group."""
    for send in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            send(pid, signal.SIGKILL)


def clean(folder):
    """Remove a folder, even if the program removed its permissions."""

    def again(function, path, _):
        try:
            os.chmod(os.path.dirname(path), 0o700)
            os.chmod(path, 0o700)
            function(path)
        except OSError:
            pass

    shutil.rmtree(folder, onerror=again)


def works(action):
    """Return whether ``action`` succeeds, tried in a forked child because locks cannot be undone."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitpid(pid, 0)[1] == 0


def protect(locks, root):
    """Leave the network and the mounts if possible. Return the names of all protections that work here."""
    names = ["limits"]
    if sys.platform == "linux":
        if works(locks.namespaces):
            locks.namespaces()
            names.append("namespaces")
            with contextlib.suppress(OSError):
                locks.tmpfs(root)
                names.append("tmpfs")
        actions = {"landlock": lambda: locks.landlock(libraries(), [root]), "seccomp": locks.seccomp}
        for name, action in actions.items():
            if works(lambda action=action: (locks.prctl(PR_SET_NO_NEW_PRIVS, 1), action(), os.listdir(root))):
                names.append(name)
    if "landlock" not in names or "seccomp" not in names:
        names.append("audit")
    return names


def main():
    """Serve requests until the caller closes the socket. A message is a length and JSON."""
    control, root = socket.socket(fileno=int(sys.argv[1])), sys.argv[2]
    locks = Locks()
    protections = protect(locks, root)
    gc.collect()
    gc.freeze()  # so that garbage collection in a program does not copy memory shared with this process
    try:
        serve(locks, protections, root, control)
    finally:
        if "tmpfs" in protections:
            locks.check(locks.libc.umount2(root.encode(), MNT_DETACH))
        shutil.rmtree(root, ignore_errors=True)


def serve(locks, protections, root, control):
    """Answer requests one after another. The first message names the protections."""
    stream = control.makefile("rwb")
    message = {"protections": protections}
    while True:
        data = json.dumps(message).encode()
        stream.write(struct.pack("<Q", len(data)) + data)
        stream.flush()
        header = stream.read(8)
        if len(header) < 8:
            return
        request = json.loads(stream.read(struct.unpack("<Q", header)[0]))
        message = run(locks, protections, request, root, control)


if __name__ == "__main__":
    main()
