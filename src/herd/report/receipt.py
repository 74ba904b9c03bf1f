"""Receipts: every measured number is one JSON record that says how it came to be.

A number without its command, commit and machine cannot be checked and soon cannot be believed. So a measurement ends
in `write_receipt(...)`, which adds what nobody should type by hand (git commit and whether the tree was dirty,
processor and its vector instructions, cores, memory, Python and torch versions, UTC date), and README tables are
generated from these files, never typed (`tables.py`). A receipt is one flat file, so `git log bench/receipts/x.json`
is the history of a number.

Layout of a file (`schema` 1)::

    {"schema": 1, "name": "throughput", "what": "one sentence",
     "values": {"pace": {"value": 980.2, "unit": "tokens/s", "lo": 962.0, "hi": 995.1, "bar": "≥ 880", "passed": true},
                "memory": {"value": 2147483648, "unit": "bytes"}},
     "command": "...", "seed": 0, "rivals": {"transformers": "5.23.0"}, "notes": "...",
     "commit": {"hash": "...", "dirty": false}, "machine": {...}, "date": "2026-01-31T12:00:00Z"}

Torch is never imported here: its version is read from the installed package's metadata.
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
from ..files import write_atomically

SCHEMA = 1
# fmt: off
_ISA_FLAGS = (
    "sse4_2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx_vnni", "avx512_bf16",
    "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8", "neon", "asimd", "asimddp", "i8mm", "bf16", "sve", "sve2",
)
# fmt: on


@dataclass(frozen=True)
class Value:
    """One number: its unit ("tokens/s", "bytes", "1" for a plain ratio), and where they exist the interval
    ``lo``..``hi``, the bar it had to pass as text ("≥ 1.15") and whether it did."""

    value: float | int | str | bool
    unit: str
    lo: float | None = None
    hi: float | None = None
    bar: str | None = None
    passed: bool | None = None


@dataclass(frozen=True)
class Receipt:
    """A receipt as read back from disk."""

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

    @property
    def passed(self) -> bool | None:
        """True if every value with a bar passed, False if one did not, None if there is no bar."""
        verdicts = [value.passed for value in self.values.values() if value.passed is not None]
        return all(verdicts) if verdicts else None


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

    ``values`` are `Value`s or ``(value, unit)`` pairs. ``command`` is what a reader types to repeat the measurement;
    ``rivals`` maps a rival's name to its version. ``made_by`` is the `commit` whose code measured, if that is not the
    current commit of the checkout around the file. An old file stays as it is until the new one is complete.
    Raises `ReportError` for a value that is not finite, a missing unit or an empty set of values.
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
        "commit": commit(path.parent) if made_by is None else dict(made_by),
        "machine": machine(),
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
    write_atomically(path, json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return path


def read_receipt(path: Path | str) -> Receipt:
    """Read one receipt; raises `ReportError` naming the file if it is not one."""
    path = Path(path)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["schema"] != SCHEMA:
            raise ReportError(f"{path}: receipt schema {record['schema']} is not {SCHEMA}: write it anew")
        fields = {key: record[key] for key in Receipt.__dataclass_fields__ if record.get(key) is not None}
        return Receipt(
            **(fields | {"values": {key: Value(**value) for key, value in record["values"].items()}})
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ReportError(f"{path}: not a receipt ({reason}); delete it or write it anew") from error


def read_receipts(folder: Path) -> dict[str, Receipt]:
    """Read all receipts ``*.json`` of a folder; return them by name, in the order of their names."""
    return {path.stem: read_receipt(path) for path in sorted(folder.glob("[!.]*.json"))}


def commit(folder: Path | str = ".") -> dict[str, Any]:
    """``{"hash", "dirty"}`` of the git checkout around ``folder``; ``hash`` is None outside one. Untracked files and
    receipts themselves do not make a tree dirty: measuring several things in a row leaves several new receipts."""
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
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)bench/receipts")
    return {"hash": head, "dirty": None if changed is None else bool(changed)}


def machine() -> dict[str, Any]:
    """The machine in words and numbers: processor, usable cores, vector instructions, memory in bytes, versions."""
    cpu, flags = _cpu()
    return {
        "cpu": cpu,
        "cores": usable_cores(),
        "isa": [flag for flag in _ISA_FLAGS if flag in flags],
        "memory_bytes": _memory_bytes(),
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": package_version("torch"),
    }


def usable_cores() -> int:
    """Cores this process may run on: its affinity mask, and a container's CPU quota where one is set."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cores = min(cores, max(1, round(int(quota) / int(period))))
    except (OSError, ValueError):
        pass
    return cores


def free_bytes() -> int:
    """Memory that can be had now: what the system calls available, or less where a container is allowed less."""
    import psutil

    free = psutil.virtual_memory().available
    root = Path("/sys/fs/cgroup")
    try:
        limit, used = (root / "memory.max").read_text().strip(), int((root / "memory.current").read_text())
        stat = dict(line.split() for line in (root / "memory.stat").read_text().splitlines())
    except OSError:
        return free
    used -= int(stat.get("inactive_file", 0))  # cached files are counted as used, yet give way
    return free if limit == "max" else min(free, max(0, int(limit) - used))


def package_version(name: str) -> str | None:
    """Version of an installed distribution without importing it, or None."""
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
            raise ReportError(
                f"receipt {receipt!r}: value {key!r} is {number}; only finite numbers are recorded"
            )
    return value


def _cpu() -> tuple[str, set[str]]:
    """Name of the processor and its instruction set flags (empty where the system does not tell)."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return _darwin_cpu() or platform.processor() or platform.machine(), set()
    name = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    return name.group(1).strip() if name else platform.machine(), set(
        flags.group(1).split()
    ) if flags else set()


def _darwin_cpu() -> str | None:
    if platform.system() != "Darwin":
        return None
    done = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True)
    return done.stdout.strip() or None


def _memory_bytes() -> int | None:
    """Physical memory, or the container's limit where that is lower."""
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        return min(total, int(limit)) if limit != "max" else total
    except (OSError, ValueError):
        return total
