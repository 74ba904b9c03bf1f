"""Build the native kernels (`native/*.cpp`) on first use, in about twenty seconds, and load them.

The native library is stored in Herd's cache folder under a hash of everything it depends on: sources, flags,
compiler, processor and torch's version. So another machine or a changed source has another file. It is
written under a temporary name and renamed. Processes that need it at the same time wait for the first one.

Without a compiler there is one warning, and every operator uses its plain torch reference. ``HERD_NATIVE=0``
asks for the references. ``python -m herd.kernels.build`` builds ahead of time, as `make setup` does.
Quantized products are built for the fastest instruction set of this machine only. ``HERD_ISA`` or
``HERD_ALL_PATHS=1`` builds them for all. ``HERD_ISA=avx2`` or ``avx512`` also builds all other kernels for
it, so that a newer processor can measure what an older one runs.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..machine import cache_folder

F = TypeVar("F", bound=Callable[..., Any])
SOURCES = Path(__file__).parent / "native"
FLAGS = ["-std=c++20", "-O3", "-fPIC", "-shared", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"]
# the stable ABI of torch 2.10, which later versions load too
FLAGS += ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
OLDER = {"avx2": "haswell", "avx512": "skylake-avx512"}
"""The compiler's names of processors with these instruction sets and no newer ones."""


def constant(function: F) -> F:
    """Mark a function whose result torch.compile may take as a constant.

    `torch.compiler.assume_constant_result` does the same, but imports the whole compiler, which takes 0.8 s.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant
def ready() -> bool:
    """Return whether ``torch.ops.herd_native`` can be called. The first call builds the native library."""
    return _load()


@functools.cache
def _load() -> bool:
    if os.environ.get("HERD_NATIVE", "1") == "0":
        return False
    try:
        torch.ops.load_library(str(library()))
    except (OSError, subprocess.SubprocessError) as error:
        warnings.warn(
            f"native kernels are not available, so plain torch is used, which is slower: {_reason(error)}",
            stacklevel=4,
        )
        return False
    return True


def library() -> Path:
    """Return the shared library for this machine, built if needed. Raises OSError or SubprocessError."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise OSError("no C++ compiler found: install g++")
    flags = [*FLAGS, *_machine_flags()]
    if os.environ.get("HERD_ISA") or os.environ.get("HERD_ALL_PATHS"):
        flags.append("-DHERD_ALL_PATHS")
    path = cache_folder() / f"kernels-{_fingerprint(compiler, flags)}.so"
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=path.parent).close()
        except OSError as error:
            raise OSError(f"{error}; set HERD_CACHE to a folder that can be written") from error
        with _lock(path.parent):  # waiting is faster than building twice
            if not path.exists():
                _compile(compiler, flags, path)
    return path


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Let one process at a time in, where the disk has locks."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _compile(compiler: str, flags: list[str], path: Path) -> None:
    torch_folder = Path(torch.__file__).parent
    include = [f"-I{torch_folder / 'include'}", f"-I{torch_folder / 'include/torch/csrc/api/include'}"]
    link = [f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10"]
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        objects = [Path(folder) / f"{source.stem}.o" for source in _sources()]
        compilations = [
            subprocess.Popen(
                [compiler, *flags, "-c", *include, str(source), "-o", str(target)],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for source, target in zip(_sources(), objects, strict=True)
        ]
        outputs = [(process.communicate()[0], process.returncode) for process in compilations]
        for output, code in outputs:
            if code:
                raise subprocess.CalledProcessError(code, compiler, output)
        linked = Path(folder) / path.name
        command = [compiler, *flags, *map(str, objects), *link, "-o", str(linked)]
        subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        os.replace(linked, path)


def _machine_flags() -> list[str]:
    if platform.machine() in ("x86_64", "AMD64"):
        wanted = os.environ.get("HERD_ISA", "")
        known = f" {'avx512bw' if wanted == 'avx512' else wanted} " in f"{_processor()} "
        return [f"-march={OLDER.get(wanted, 'native') if known else 'native'}", "-mprefer-vector-width=512"]
    return ["-mcpu=native"]


def _sources() -> list[Path]:
    return sorted(SOURCES.glob("*.cpp"))


def _fingerprint(compiler: str, flags: list[str]) -> str:
    version = subprocess.run(
        [compiler, "-dumpfullversion", "-dumpmachine"], capture_output=True, text=True, check=True
    )
    parts = [*flags, version.stdout, _processor(), torch.__version__]
    digest = hashlib.sha256("\0".join(parts).encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _processor() -> str:
    """Return the instruction sets that ``-march=native`` sees."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def _reason(error: Exception) -> str:
    """Return one line: the compiler's first error if there is one."""
    output = getattr(error, "output", None) or str(error)
    lines = [line for line in output.splitlines() if "error" in line] or output.splitlines() or [repr(error)]
    return lines[0]


if __name__ == "__main__":
    print("native kernels:", library() if ready() else "not built, see the warning")
