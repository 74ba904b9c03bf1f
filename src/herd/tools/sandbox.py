"""Run Python that nobody has read: a model's programs and the calls of its code interpreter.

A `Sandbox` is one helper process (`zygote.py`) that forks for every program, so that checking two hundred small
functions costs two hundred forks and not two hundred starts of Python. Each program gets an empty environment, a folder
of its own that vanishes, bounded memory, time, output and disk, and no network, no processes, no signals, no files but
Python's own library to read. The caller learns with every result which protections held (`SandboxResult.protections`);
where the kernel offers less than Landlock and seccomp, a `SandboxWarning` says so once a sandbox.

This is a wall against mistakes and clumsy malice of generated code, with the Linux kernel's own locks; it is not a
virtual machine, and a hole in the kernel is a hole in it.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ..errors import ToolError

TIMEOUT_S = 5.0
MEMORY_BYTES = 256 << 20
OUTPUT_BYTES = 64 << 10
KERNEL = frozenset({"landlock", "seccomp"})
GRACE_S = 10.0
"""How much longer than a program's own limit the helper may take before it is given up."""


class SandboxWarning(UserWarning):
    """Programs run with weaker protection than the kernel's."""


@dataclass(frozen=True)
class SandboxResult:
    """What became of a program. ``ok``: it ended by itself with status 0. ``reason``: why not, empty if ok.

    ``stdout`` and ``stderr``: at most the allowed bytes each, decoded as UTF-8 with replacement. ``protections``: which
    locks held. ``seconds``: wall time.
    """

    ok: bool
    stdout: str
    stderr: str
    reason: str
    protections: tuple[str, ...]
    seconds: float


class Sandbox:
    """A helper process that runs programs one after another. Close it, or use it in a ``with`` statement.

    Raises ToolError where there is no sandbox to be had (no POSIX system, no second process).
    """

    PROGRAM: ClassVar[Path] = Path(__file__).with_name("zygote.py")

    def __init__(self) -> None:
        if os.name != "posix":
            raise ToolError(f"sandbox: needs Linux or macOS, this is {sys.platform}; run Herd there")
        self._folder = tempfile.mkdtemp(prefix="herd-sandbox-")
        ours, theirs = socket.socketpair()
        try:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-s",
                    "-S",
                    "-P",
                    "-X",
                    "utf8",
                    str(self.PROGRAM),
                    str(theirs.fileno()),
                    self._folder,
                ],
                pass_fds=(theirs.fileno(),),
                env={
                    "PYTHONHASHSEED": "0",
                    "PYTHONDONTWRITEBYTECODE": "1",
                },  # the same sets in the same order, always
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                start_new_session=True,
                cwd="/",
            )
        except OSError as error:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise ToolError(f"sandbox: {sys.executable} cannot be started ({error.strerror})") from None
        theirs.close()
        self._socket = ours
        self._turn = threading.Lock()
        self.protections: tuple[str, ...] = tuple(self._receive(30.0)["protections"])
        if not KERNEL.issubset(self.protections):
            missing = ", ".join(sorted(KERNEL - set(self.protections)))
            warnings.warn(
                f"sandbox: this system has no {missing}; programs are held by {', '.join(self.protections)} only",
                SandboxWarning,
                stacklevel=2,
            )

    def run(
        self,
        code: str,
        *,
        stdin: str = "",
        timeout_s: float = TIMEOUT_S,
        memory_bytes: int = MEMORY_BYTES,
        output_bytes: int = OUTPUT_BYTES,
    ) -> SandboxResult:
        """Run one program; whatever it does comes back as a result. ToolError only if the helper itself is gone."""
        request = {
            "code": code,
            "stdin": stdin,
            "timeout_s": timeout_s,
            "memory_bytes": memory_bytes,
            "output_bytes": output_bytes,
        }
        data = json.dumps(request).encode()
        with self._turn:  # threads may share a sandbox; its programs still run one after another
            try:
                self._socket.settimeout(GRACE_S)
                self._socket.sendall(struct.pack("<Q", len(data)) + data)
            except OSError:
                raise self._gone() from None
            reply = self._receive(timeout_s + GRACE_S)
        return SandboxResult(
            not reply["reason"],
            reply["stdout"],
            reply["stderr"],
            reply["reason"],
            self.protections,
            reply["seconds"],
        )

    def run_many(self, programs: Iterable[str], **limits: Any) -> list[SandboxResult]:
        """Results of several programs, each in a fresh process; ``limits`` as for `run`."""
        return [self.run(code, **limits) for code in programs]

    def close(self) -> None:
        """End the helper and remove its folder."""
        self._socket.close()
        try:
            self._process.wait(timeout=2.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stderr:
            self._process.stderr.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _receive(self, timeout_s: float) -> dict[str, Any]:
        self._socket.settimeout(timeout_s)
        try:
            size = struct.unpack("<Q", self._read(8))[0]
            return json.loads(self._read(size))
        except (OSError, EOFError, ValueError):
            raise self._gone() from None

    def _read(self, n: int) -> bytes:
        data = bytearray()
        while len(data) < n:
            piece = self._socket.recv(min(1 << 20, n - len(data)))
            if not piece:
                raise EOFError
            data += piece
        return bytes(data)

    def _gone(self) -> ToolError:
        self._process.kill()
        self._process.wait()
        error = self._process.stderr.read().decode(errors="replace").strip() if self._process.stderr else ""
        return ToolError(
            f"sandbox: its helper process ended ({error.splitlines()[-1] if error else 'no answer'})"
        )


def run_python(
    code: str,
    *,
    stdin: str = "",
    timeout_s: float = TIMEOUT_S,
    memory_bytes: int = MEMORY_BYTES,
    output_bytes: int = OUTPUT_BYTES,
) -> SandboxResult:
    """Run one program in a sandbox of its own (about 0.1 s to start); see `Sandbox.run`. For many, keep a `Sandbox`."""
    with Sandbox() as sandbox:
        return sandbox.run(
            code, stdin=stdin, timeout_s=timeout_s, memory_bytes=memory_bytes, output_bytes=output_bytes
        )
