"""Write and read receipts: JSON records of measured numbers that say how they were measured.

A number without its command, commit and machine cannot be checked. So a measurement ends with
`write_receipt(...)`. It adds the git commit (and whether there were uncommitted changes), the processor and
its instruction sets, cores, memory, the versions of Python and torch, and the date in UTC. The tables of the
README are generated from these files. A receipt is one file, so `git log bench/receipts/NAME.json` is the
history of a number.

Layout of a file (`schema` 1)::

    {"schema": 1, "name": "throughput", "what": "one sentence",
     "values": {"speed": {"value": 980.2, "unit": "tokens/s", "lo": 962.0, "hi": 995.1, "bar": "≥ 880",
                          "passed": true},
                "memory": {"value": 2147483648, "unit": "bytes"}},
     "command": "...", "seed": 0, "rivals": {"transformers": "5.23.0"}, "notes": "...",
     "commit": {"hash": "...", "dirty": false}, "machine": {...}, "date": "2026-01-31T12:00:00Z"}

Does not import torch: its version is read from the metadata of the installed package.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from ..errors import ReportError
from ..files import write_json
from ..machine import cores, total_memory

SCHEMA = 1
# fmt: off
_ISA_FLAGS = (
    "sse4_2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx_vnni",
    "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8",
    "neon", "asimd", "asimddp", "i8mm", "bf16", "sve", "sve2",
)
# fmt: on
_ISA_NAMES = {
    "vnni": "AVX-512 VNNI",
    "avx512": "AVX-512",
    "avxvnni": "AVX-VNNI",
    "avx2": "AVX2",
    "portable": "portable C++",
    "reference": "plain torch",
}


@dataclass(frozen=True)
class Value:
    """A number with its unit ("tokens/s", "bytes", "1" for a plain ratio).

    Optional: its interval ``lo`` to ``hi``, the bar that it must reach as text ("≥ 1.15"), and whether it
    does.
    """

    value: float | int | str | bool
    unit: str
    lo: float | None = None
    hi: float | None = None
    bar: str | None = None
    passed: bool | None = None


@dataclass(frozen=True)
class Receipt:
    """A receipt of a file."""

    name: str
    what: str
    values: dict[str, Value]
    command: str
    date: str
    commit: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None
    rivals: dict[str, str] = field(default_factory=dict)
    notes: str | None = None


def write_receipt(
    path: Path,
    *,
    what: str,
    values: Mapping[str, Value | tuple[Any, str]],
    command: str,
    seed: int | None = None,
    rivals: Mapping[str, str] | None = None,
    notes: str | None = None,
    made_by: Mapping[str, Any] | None = None,
) -> Path:
    """Write one receipt, named after its file, and return its path.

    ``values`` are `Value`s or ``(value, unit)`` pairs. ``command`` repeats the measurement. ``rivals`` maps
    the names of the programs compared with to their versions. ``made_by`` is the commit whose code measured,
    if it is not the current commit of the file's checkout. An old file is unchanged until the new one is
    complete. Raises `ReportError` for a value that is not finite, a missing unit or an empty set of values.
    """
    if not values:
        raise ReportError(f"receipt {path.stem!r} has no values: a receipt records at least one number")
    checked = {key: _checked(path.stem, key, value) for key, value in values.items()}
    record = {
        "schema": SCHEMA,
        "name": path.stem,
        "what": what,
        "values": {
            key: {k: v for k, v in asdict(value).items() if v is not None} for key, value in checked.items()
        },
        "command": command,
        "seed": seed,
        "rivals": dict(rivals or {}),
        "notes": notes,
        "commit": git_commit(path.parent) if made_by is None else dict(made_by),
        "machine": describe_machine(),
        "date": utc_now(),
    }
    write_json(path, record)
    return path


def read_receipt(path: Path) -> Receipt:
    """Read one receipt. Raises `ReportError`, which names the file, if it is not a receipt."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["schema"] != SCHEMA:
            raise ReportError(f"{path}: receipt schema {record['schema']} is not {SCHEMA}; measure again")
        fields = {key: record[key] for key in Receipt.__dataclass_fields__ if record.get(key) is not None}
        values = {key: Value(**value) for key, value in record["values"].items()}
        return Receipt(**(fields | {"values": values}))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ReportError(f"{path}: not a receipt ({reason}); delete it or measure again") from error


def read_receipts(folder: Path) -> dict[str, Receipt]:
    """Return all receipts ``*.json`` of a folder by name, in the order of their names."""
    return {path.stem: read_receipt(path) for path in sorted(folder.glob("[!.]*.json"))}


def git_commit(folder: Path | str = ".") -> dict[str, Any]:
    """Return ``{"hash", "dirty"}`` of the git checkout around ``folder``.

    ``hash`` is None outside a checkout.

    Untracked files, receipts and documents do not make a tree dirty: measuring several things leaves several
    new receipts, and tables made of them.
    """
    folder = Path(folder).resolve()
    while not folder.exists():
        folder = folder.parent

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, timeout=30)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "HEAD")
    if head is None:
        return {"hash": None, "dirty": None}
    others = (":(top,exclude)bench/receipts", ":(top,exclude)docs", ":(top,exclude)*.md")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", *others)
    return {"hash": head, "dirty": None if changed is None else bool(changed)}


def describe_machine() -> dict[str, Any]:
    """Return the properties of this machine: processor, instruction sets, cores, memory, versions."""
    cpu, flags = _processor()
    return {
        "cpu": cpu,
        "cores": cores(),
        "instruction_set": _instruction_set(flags),
        "isa": [flag for flag in _ISA_FLAGS if flag in flags],
        "memory_bytes": total_memory(),
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": package_version("torch"),
    }


def utc_now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def package_version(name: str) -> str | None:
    """Return the version of an installed distribution without importing it, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _checked(receipt: str, key: str, value: Value | tuple[Any, str]) -> Value:
    value = value if isinstance(value, Value) else Value(*value)
    if not value.unit:
        raise ReportError(f"receipt {receipt!r}: value {key!r} has no unit; use '1' for a plain ratio")
    for number in (value.value, value.lo, value.hi):
        if isinstance(number, float) and not math.isfinite(number):
            raise ReportError(f"receipt {receipt!r}: value {key!r} is {number}; give a finite number")
    return value


def _processor() -> tuple[str, set[str]]:
    """Return the processor's name and its instruction set flags (none if the system hides them)."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.machine(), set()
    name = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    return name[1].strip() if name else platform.machine(), set(flags[1].split()) if flags else set()


def _instruction_set(flags: set[str]) -> str:
    """Return the instruction set of quantized products: what ``HERD_ISA`` names, or the processor's best.

    ``kernels/native/qmatmul_*.cpp`` have the same conditions.
    """
    if wanted := os.environ.get("HERD_ISA"):
        return _ISA_NAMES.get(wanted, wanted)
    if flags >= {"avx512f", "avx512bw", "avx512dq", "avx512vl"}:
        return _ISA_NAMES["vnni" if "avx512_vnni" in flags else "avx512"]
    if flags >= {"avx2", "fma", "f16c"}:
        return _ISA_NAMES["avxvnni" if "avx_vnni" in flags else "avx2"]
    return _ISA_NAMES["portable"]
