"""Run untrusted Python programs: programs that a model wrote, and the calls of its code interpreter.

A `Sandbox` is one helper process (`zygote.py`) that forks for every program, so checking two hundred small
functions costs two hundred forks and not two hundred starts of Python. Each program gets an empty
environment, its own temporary folder, and limits for memory, time, output and disk. It cannot use the
network, start processes or send signals, and outside its folder it can only read Python's own library. Every
result names the protections that were in force (`SandboxResult.protections`). If the kernel lacks Landlock or
seccomp, a `SandboxWarning` says so once per sandbox.

This protects against mistakes and simple malice in generated code, by means of the Linux kernel. It is not a
virtual machine: a hole in the kernel is a hole in the sandbox.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ..errors import ToolError

KERNEL = frozenset({"landlock", "seccomp"})
GRACE_S = 10.0
"""Seconds that the helper may take in addition to a program's time limit before it counts as dead."""


class SandboxWarning(UserWarning):
    """Warning that programs run without some of the kernel's protections."""


@dataclass(frozen=True)
class SandboxResult:
    """The result of a program.

    ``ok``: it ended by itself with status 0. Otherwise ``reason`` says why it failed.

    ``stdout`` and ``stderr`` are truncated to the output limit and decoded as UTF-8 with replacement
    characters. ``protections`` names the protections that were in force. ``seconds`` is wall time.
    """

    ok: bool
    stdout: str
    stderr: str
    reason: str
    protections: tuple[str, ...]
    seconds: float


class Sandbox:
    """A helper process that runs programs one after another. Close it, or use it in a ``with`` statement.

    Raises `ToolError` if no sandbox is possible: not a POSIX system, or the helper cannot be started.
    """

    PROGRAM: ClassVar[Path] = Path(__file__).with_name("zygote.py")

    def __init__(self) -> None:
        if os.name != "posix":
            raise ToolError(f"sandbox: needs Linux or macOS, this is {sys.platform}; run Herd there")
        self._folder = tempfile.mkdtemp(prefix="herd-sandbox-")
        ours, theirs = socket.socketpair()
        fd = theirs.fileno()
        options = ("-s", "-S", "-P", "-X", "utf8")
        command = [sys.executable, *options, str(self.PROGRAM), str(fd), self._folder]
        streams: Any = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        # With a fixed hash seed, sets have the same order in every run.
        environment = {"PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1"}
        try:
            self._process = subprocess.Popen(
                command, pass_fds=(fd,), env=environment, start_new_session=True, cwd="/", **streams
            )
        except OSError as error:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise ToolError(f"sandbox: {sys.executable} cannot be started ({error.strerror})") from None
        theirs.close()
        self._socket = ours
        self._turn = threading.Lock()
        self.protections: tuple[str, ...] = tuple(self._receive(30.0)["protections"])
        if missing := sorted(KERNEL.difference(self.protections)):
            held = f"programs are confined by {', '.join(self.protections)} only"
            note = f"sandbox: this system has no {', '.join(missing)}; {held}"
            warnings.warn(note, SandboxWarning, stacklevel=2)

    def run(
        self,
        code: str,
        *,
        stdin: str = "",
        timeout_s: float = 5.0,
        memory_bytes: int = 256 << 20,
        output_bytes: int = 64 << 10,
    ) -> SandboxResult:
        """Run a program and return its result. Raises `ToolError` if the helper process has ended."""
        limits = {"timeout_s": timeout_s, "memory_bytes": memory_bytes, "output_bytes": output_bytes}
        data = json.dumps({"code": code, "stdin": stdin, **limits}).encode()
        with self._turn:  # threads may share a sandbox: their programs run one after another
            try:
                self._socket.settimeout(GRACE_S)
                self._socket.sendall(struct.pack("<Q", len(data)) + data)
            except OSError:
                raise self._helper_ended() from None
            reply = self._receive(timeout_s + GRACE_S)
        return SandboxResult(ok=not reply["reason"], protections=self.protections, **reply)

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
            raise self._helper_ended() from None

    def _read(self, n: int) -> bytes:
        data = bytearray()
        while len(data) < n:
            piece = self._socket.recv(min(1 << 20, n - len(data)))
            if not piece:
                raise EOFError
            data += piece
        return bytes(data)

    def _helper_ended(self) -> ToolError:
        self._process.kill()
        self._process.wait()
        error = self._process.stderr.read().decode(errors="replace").strip() if self._process.stderr else ""
        return ToolError(f"sandbox: its helper ended ({error.splitlines()[-1] if error else 'no answer'})")


def run_python(code: str, **options: Any) -> SandboxResult:
    """Run one program in a new sandbox (about 0.1 s to start). It has the options of `Sandbox.run`."""
    with Sandbox() as sandbox:
        return sandbox.run(code, **options)
