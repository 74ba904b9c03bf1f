"""What this machine can do, measured once and kept: the profile that `herd plan` predicts from.

A data sheet says what a chip could do; a profile says what Herd's own operators reach on it: bytes read a
second by number of threads, operations a second of a matmul by weight format and number of rows, attention in
prefill and in decode, the time between operators, the disk. From it comes a `roofline.Device`, so a measured
machine and one of the catalogue go through the same formulas. Measuring takes half a minute and torch
(`measure.py`); reading a saved profile needs neither.

The file lies in ``~/.cache/herd`` (or ``HERD_CACHE``). It is measured anew where processor, torch or the
native kernels are other ones than those it was measured with.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..errors import PlanError
from ..files import write_atomically
from ..report import receipt
from .machines import Machine
from .roofline import Device, Efficiency, EfficiencyCurve, Link

SCHEMA = 4
BYTES = {"fp32": 4.0, "bf16": 2.0, "q8": 34 / 32, "q4k": 144 / 256, "q4": 18 / 32}
"""Of a weight, by the name of its format."""
OPS_PER_LAYER = 9
"""Operators that `ops.layer_ops` lists of a block; the measured time between operators is spread over
them."""


@dataclass(frozen=True)
class Gpu:
    """One accelerator as measured: bytes, bytes/s of a copy, operations/s of a bf16 matmul, bytes/s to the
    next one."""

    name: str
    memory: int
    bandwidth: float
    bf16: float
    peer: float | None = None


@dataclass(frozen=True)
class Profile:
    """``gemm``: operations/s by weight format and rows; ``between``: seconds between operators in a block,
    all told, of a model with ``plain`` weights and of a ``packed`` one, whose blocks are one native operator
    each."""

    key: str
    date: str
    cpu: str
    cores: int
    isa: tuple[str, ...]
    memory: int
    threads: int
    bandwidth: Mapping[int, float]  # bytes/s by threads
    gemm: Mapping[str, Mapping[int, float]]
    attention_prefill: Mapping[str, float]  # operations/s by kind of KV cache
    attention_decode: Mapping[str, float]  # bytes/s of keys and values by kind of KV cache
    pointwise: float  # bytes/s
    between: Mapping[str, float]
    encode: Mapping[str, float]  # weights/s that are rounded to blocks, by format
    hash: float  # bytes/s of SHA-256 on one thread
    hash_all: float  # on all of them
    disk: float | None  # bytes/s read past the page cache; None where it could not be measured
    disk_write: float | None  # bytes/s written, until they are on the disk
    base: int  # bytes of a process with everything loaded but a model
    seconds: float  # that measuring took
    gpus: tuple[Gpu, ...] = ()

    @property
    def read(self) -> float:
        """Bytes/s that all threads read: plainly, or in a matmul of one row, which asks for them ahead of
        time."""
        rows = ((BYTES[name], rates[1]) for name, rates in self.gemm.items() if 1 in rates)
        return max([*self.bandwidth.values(), *(nbytes * rate / 2 for nbytes, rate in rows)])

    def device(self, weights: str = "plain") -> Device:
        """The processor as the roofline sees it: peaks are the best rates measured, shares what is reached of
        them. ``weights``: a key of ``between``."""
        peaks = {name: max(rates.values()) for name, rates in self.gemm.items()}
        curves = {
            name: EfficiencyCurve(
                tuple((float(rows), rate / peaks[name]) for rows, rate in sorted(rates.items()))
            )
            for name, rates in self.gemm.items()
        }
        if "bf16" not in peaks:  # the roofline asks for it where an operator names no dtype of its own
            peaks["bf16"], curves["bf16"] = max(peaks.values()), EfficiencyCurve.flat(1.0)
        reference = peaks["bf16"]
        return Device(
            "here",
            "cpu",
            float(self.memory),
            self.read,
            peaks,
            Efficiency(
                gemm=curves,
                memory=EfficiencyCurve.flat(1.0),
                attention_forward=max(self.attention_prefill.values()) / reference,
                attention_backward=max(self.attention_prefill.values()) / reference,
                op_seconds=self.between[weights] / OPS_PER_LAYER,
                source=f"measured here, {self.date}",
            ),
            title=f"this machine: {self.cpu}, {self.cores} cores",
            source="measured",
        )

    def machine(self) -> Machine:
        """This machine as one of the catalogue: a single device, joined to nothing, without prices."""
        alone = Link("none", 1e12, 0.0, 1.0)
        return Machine("this machine", self.device(), 1, 1, alone, alone)


def cache_folder() -> Path:
    """Where Herd keeps what can be made again."""
    return Path(os.environ.get("HERD_CACHE") or Path.home() / ".cache" / "herd")


def profile_path() -> Path:
    return cache_folder() / "profile.json"


def key() -> str:
    """A hash of all that a profile depends on: processor, cores, memory, torch, native kernels."""
    where = receipt.describe_machine()
    parts = [str(where[name]) for name in ("cpu", "cores", "isa", "memory_bytes", "torch")]
    digest = hashlib.sha256("\0".join([*parts, os.environ.get("OMP_NUM_THREADS", "")]).encode())
    native = Path(__file__).parent.parent / "kernels" / "native"
    for source in sorted(native.iterdir()):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def load() -> Profile | None:
    """The saved profile of this very machine, or None where there is none or it is of another state of it."""
    try:
        record = json.loads(profile_path().read_text(encoding="utf-8"))
        if record["schema"] != SCHEMA or record["key"] != key():
            return None
        return _from_record(record)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def save(profile: Profile) -> Path:
    """Write the profile where `load` finds it."""
    record = {"schema": SCHEMA} | dataclasses.asdict(profile)
    path = profile_path()
    write_atomically(path, json.dumps(record, indent=1) + "\n")
    return path


def from_file(path: Path) -> Profile:
    """A profile that was saved elsewhere. `PlanError` for anything else."""
    try:
        return _from_record(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise PlanError(f"profile {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PlanError(
            f"{path} is not a profile ({type(error).__name__}: {error}): measure one with herd plan"
        ) from error


def _from_record(record: Mapping[str, Any]) -> Profile:
    fields = {field.name: record[field.name] for field in dataclasses.fields(Profile)}
    return Profile(
        **fields
        | {
            "isa": tuple(fields["isa"]),
            "bandwidth": {int(threads): float(rate) for threads, rate in fields["bandwidth"].items()},
            "gemm": {
                name: {int(rows): float(rate) for rows, rate in rates.items()}
                for name, rates in fields["gemm"].items()
            },
            "gpus": tuple(Gpu(**gpu) for gpu in fields["gpus"]),
        }
    )


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
