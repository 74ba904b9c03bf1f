"""Hostile programs: each must end with a reason, and the machine must not notice."""

import json
import os
import socket
import struct
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from herd.errors import ToolError
from herd.tools.sandbox import Sandbox, SandboxWarning, run_python

LINUX = sys.platform == "linux"


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox() as box:
        yield box


def refused(result, *words):
    assert not result.ok
    assert result.reason
    assert any(word in result.stderr + result.reason for word in words), result


def test_a_program_gets_stdin_and_its_output_comes_back(sandbox):
    result = sandbox.run("import sys\nprint(int(input()) * 2)\nprint('no', file=sys.stderr)", stdin="21\n")
    assert (result.ok, result.stdout, result.stderr, result.reason) == (True, "42\n", "no\n", "")
    assert "limits" in result.protections


def test_two_hundred_programs_share_no_state(sandbox):
    programs = [
        f"import math\nassert not hasattr(math, 'seen')\nmath.seen = 1\nprint({n} ** 2)" for n in range(200)
    ]
    assert [sandbox.run(program).stdout for program in programs] == [f"{n * n}\n" for n in range(200)]


def test_the_same_program_prints_the_same_in_every_sandbox(sandbox):
    program = "print({str(i) for i in range(50)})"
    with Sandbox() as other:
        assert sandbox.run(program).stdout == other.run(program).stdout


@pytest.mark.parametrize(
    "program, status, said",
    [
        ("print(1/0)", "exit status 1", "ZeroDivisionError"),
        ("def f(", "exit status 1", "SyntaxError"),
        ("a\0b", "exit status 1", "null bytes"),
        ("x = '\ud800'", "exit status 1", "surrogates"),
        ("def f(): f()\nf()", "exit status 1", "RecursionError"),
        ("raise SystemExit(3)", "exit status 3", ""),
        ("raise SystemExit('bye')", "exit status 1", "bye"),
        ("raise KeyboardInterrupt", "exit status 1", "KeyboardInterrupt"),
        ("import os; os._exit(7)", "exit status 7", ""),
        ("assert 1 == 2, 'sum'", "exit status 1", "AssertionError: sum"),
        ("(" * 5000, "exit status 1", ""),
    ],
)
def test_failures_give_their_reason(sandbox, program, status, said):
    result = sandbox.run(program)
    assert not result.ok
    assert result.reason == status
    assert said in result.stderr
    assert "zygote" not in result.stderr


def test_traceback_names_the_program_only(sandbox):
    error = sandbox.run("def f():\n    raise ValueError('x')\nf()").stderr
    assert error.startswith('Traceback (most recent call last):\n  File "<program>", line 3')


@pytest.mark.parametrize(
    "program",
    ["while True: pass", "import time; time.sleep(99)",
    "import os; os.close(1); os.close(2)\nwhile True: pass",
     "import signal as s\nfor n in (1, 2, 15, 24):\n  try: s.signal(n, s.SIG_IGN)\n  except OSError: 0\nwhile 1: 0",
     "while True:\n  try:\n    while True: pass\n  except BaseException: pass"],
)  # fmt: skip
def test_endless_programs_end_at_the_time_limit(sandbox, program):
    result = sandbox.run(program, timeout_s=0.3)
    assert result.reason == "time limit of 0.3 s"
    assert not result.ok


@pytest.mark.parametrize("stream", [1, 2])
def test_endless_output_is_cut(sandbox, stream):
    result = sandbox.run(f"import os\nwhile True: os.write({stream}, b'x' * 100000)", output_bytes=5000)
    assert result.reason == "output limit of 5000 bytes"
    assert len((result.stdout, result.stderr)[stream - 1]) == 5000


def test_lines_of_ten_megabytes_nul_and_broken_utf8(sandbox):
    result = sandbox.run("print('y' * 10_000_000)")
    assert result.reason.startswith("output limit")
    assert len(result.stdout) == 64 << 10
    assert sandbox.run("print('a\\0b')").stdout == "a\0b\n"
    assert sandbox.run("import sys; sys.stdout.buffer.write(b'\\xff\\xfe')").stdout == "��"
    assert sandbox.run("x = '" + "z" * 10_000_000 + "'\nprint(len(x))").stdout == "10000000\n"
    assert sandbox.run("print(len(input()))", stdin="s" * 1_000_000).stdout == "1000000\n"


@pytest.mark.skipif(not LINUX, reason="address space is bounded on Linux only")
def test_memory_is_bounded(sandbox):
    refused(sandbox.run("x = bytearray(10**9)"), "MemoryError")
    refused(sandbox.run("x = []\nwhile True: x.append(' ' * 10**6)", timeout_s=5), "MemoryError", "killed by")


@pytest.mark.parametrize(
    "program",
    ["import os\nwhile True: os.fork()", "import subprocess; subprocess.run(['/bin/ls'])",
    "import os; os.system('ls')",
     "import os; os.execv('/bin/ls', ['ls'])",
     "import multiprocessing as m\nm.Process(target=print).start()"],
)  # fmt: skip
def test_programs_start_no_processes(sandbox, program):
    result = sandbox.run(program, timeout_s=3)
    if "os.system" in program:  # its failure is a return value
        assert result.stdout == ""
    else:
        refused(result, "Permission", "not permitted", "not allowed")


@pytest.mark.parametrize("target", ["os.getppid()", "-1", "1", "OURS"])
def test_programs_send_no_signals_to_others(sandbox, target):
    target = target.replace("OURS", str(os.getpid()))  # here, not above: workers must collect the same names
    refused(
        sandbox.run(f"import os; os.kill({target}, 9)"), "not permitted", "not allowed", "ProcessLookupError"
    )
    assert sandbox.run("print(1)").ok


def test_programs_reach_no_network(sandbox):
    server = socket.create_server(("127.0.0.1", 0))
    port = server.getsockname()[1]
    program = f"import socket; socket.create_connection(('127.0.0.1', {port}))"
    refused(sandbox.run(program, timeout_s=3), "not permitted", "not allowed", "unreachable")
    server.settimeout(0)
    with pytest.raises(BlockingIOError):
        server.accept()
    server.close()
    refused(sandbox.run("import socket; socket.socket(socket.AF_UNIX)"), "not permitted", "not allowed")


def test_files_outside_the_folder_are_out_of_reach(sandbox, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("s3cret")
    for program in (
        f"print(open({str(secret)!r}).read())",
        f"open({str(secret)!r}, 'w')",
        f"open({str(tmp_path / 'new')!r}, 'w')",
        f"import os; os.remove({str(secret)!r})",
        f"import os; os.rename({str(secret)!r}, 'mine')",
        f"import os; os.mkdir({str(tmp_path / 'new')!r})",
        f"import os; os.chmod({str(secret)!r}, 0)",
        f"import os; os.symlink({str(secret)!r}, 'link'); print(open('link').read())",
        f"import os; os.link({str(secret)!r}, 'link'); print(open('link').read())",
        f"import os; print(os.listdir({str(tmp_path)!r}))",
        f"import os; os.truncate({str(secret)!r}, 0)",
        "print(open('/etc/passwd').read())",
        "print(open('/proc/self/environ').read())",
        f"open({os.__file__!r}, 'a')",
    ):
        result = sandbox.run(program)
        refused(result, "Permission", "not permitted", "cross-device")
        assert "s3cret" not in result.stdout + result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["secret"]
    assert secret.read_text() == "s3cret"


def test_own_folder_is_writable_and_vanishes(sandbox):
    result = sandbox.run(
        "import os\nopen('a', 'w').write('hi')\nos.mkdir('d')\nprint(os.getcwd(), open('a').read())"
    )
    folder, said = result.stdout.split()
    assert said == "hi"
    assert not Path(folder).exists()
    assert sandbox.run("import os; print(os.listdir('.'))").stdout == "[]\n"


def test_disk_is_bounded(sandbox):
    fill = "for n in range(10**6):\n  with open(f'f{n}', 'wb') as f: f.write(b'x' * 10**6)"
    result = sandbox.run(fill, timeout_s=2)
    refused(result, "No space", "File too large", "time limit")
    refused(sandbox.run("open('f', 'wb').write(b'x' * 10**8)"), "No space", "too large", "SIGXFSZ")
    assert sandbox.run("open('f', 'w').write('x' * 10**5); print(1)").ok


def test_environment_is_empty(sandbox, monkeypatch):
    with Sandbox() as fresh:
        monkeypatch.setenv("HERD_SECRET_KEY", "1")
        names = fresh.run("import os; print(sorted(os.environ))").stdout
    assert "SECRET" not in names
    assert "HOME" not in names


@pytest.mark.skipif(not LINUX, reason="goes below Python")
@pytest.mark.parametrize(
    "call", ["fork()", "socket(2, 1, 0)", "kill(-1, 9)", "open(b'/etc/passwd', 0)", "ptrace(16, 1, 0, 0)"]
)
def test_the_kernel_refuses_calls_that_go_below_python(sandbox, call):
    result = sandbox.run(f"import ctypes\nlibc = ctypes.CDLL(None)\nprint(libc.{call})")
    assert result.stdout == "-1\n" or not result.ok


def test_a_crash_is_reported_with_its_signal(sandbox):
    result = sandbox.run("import ctypes; ctypes.string_at(0)")
    assert not result.ok
    assert "SIGSEGV" in result.reason or "not allowed" in result.stderr


def test_the_standard_library_works(sandbox):
    program = (
        "import json, re, random, statistics, decimal, fractions, hashlib, heapq, zoneinfo, tempfile, dataclasses\n"
        "print(json.dumps([1]), hashlib.sha256(b'').hexdigest()[:4], statistics.mean([1, 2]))"
    )
    assert sandbox.run(program).stdout == "[1] e3b0 1.5\n"


def test_a_closed_sandbox_leaves_no_folder_and_no_process():
    assert run_python("print(1)").stdout == "1\n"
    with Sandbox() as box:
        folder = Path(box._folder)
        assert folder.exists()
    assert not folder.exists()
    assert box._process.returncode == 0


def test_nothing_remains_when_the_caller_dies_during_a_program():
    box = Sandbox()
    folder = Path(box._folder)
    request = json.dumps({"code": "while True: pass", "stdin": "", "timeout_s": 30, "memory_bytes": 1 << 28,
                          "output_bytes": 1000}).encode()  # fmt: skip
    box._socket.sendall(struct.pack("<Q", len(request)) + request)
    box._socket.close()  # what the helper sees when its caller is killed
    box._process.wait(timeout=10)
    assert not folder.exists()
    box._process.stderr.close()


def test_threads_may_share_a_sandbox(sandbox):
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(sandbox.run, [f"print({n})" for n in range(20)]))
    assert [r.stdout for r in results] == [f"{n}\n" for n in range(20)]


def test_a_killed_helper_is_one_error_line():
    with Sandbox() as box:
        box._process.kill()
        with pytest.raises(ToolError, match="helper ended"):
            box.run("print(1)")


@pytest.fixture
def audit_only(tmp_path, monkeypatch):
    """A sandbox on a machine without Landlock and seccomp: the Python-level lock must do, and be named."""
    original = Sandbox.PROGRAM
    program = tmp_path / "zygote.py"
    program.write_text(
        f"import sys\nsys.path.insert(0, {str(original.parent)!r})\nimport zygote\nsys.path.pop(0)\n"
        "zygote.protect = lambda locks, root: ['limits', 'audit']\nzygote.main()\n"
    )
    monkeypatch.setattr(Sandbox, "PROGRAM", program)
    with pytest.warns(
        SandboxWarning, match="no landlock, seccomp; programs are confined by limits, audit only"
    ):
        box = Sandbox()
    with box:
        yield box


def test_the_audit_hook_holds_programs_where_the_kernel_does_not(audit_only, tmp_path):
    assert audit_only.run(
        "import json, statistics, decimal; open('a', 'w').write('1'); print(open('a').read())"
    ).ok
    for program in (
        "import os; os.fork()",
        "import socket; socket.socket().bind(('127.0.0.1', 0))",
        "import subprocess; subprocess.run(['ls'])",
        "import os; os.kill(os.getppid(), 9)",
        "open('/etc/passwd')",
        f"open({str(tmp_path / 'new')!r}, 'w')",
        f"import os; os.rename('a', {str(tmp_path / 'new')!r})",
        "import os; os.listdir('/')",
        "import ctypes; ctypes.CDLL(None)",
    ):
        result = audit_only.run(program)
        refused(result, "PermissionError")
        assert result.protections == ("limits", "audit")
