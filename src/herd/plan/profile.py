"""The profile of this machine: measured speeds that `herd plan` predicts from.

A data sheet gives the peak of a chip. A profile gives the speed of Herd's own operators on it: bytes per
second read by number of threads, operations per second of a matmul by weight format and number of rows,
attention in prefill and in decode, the time between operators, the disk. `Profile.device` converts it to a
`roofline.Device`, so that the same formulas serve a measured machine and one of the catalogue. Measuring
takes about 30 s and needs torch (`measure.py`). Reading a saved profile does not need torch.

The file is in the cache folder. The machine is measured again if its processor, torch or the native kernels
differ from the saved profile's.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter

from ..files import write_json
from ..machine import cache_folder
from ..quant.formats import Q4_0, Q4_K, Q8_0
from ..report import receipt
from .machines import Machine
from .roofline import NO_LINK, Device, Efficiency, EfficiencyCurve

SCHEMA = 5
SECONDS = 40
"""About how many seconds it takes to measure a machine."""
_MEASURED = (Q8_0, Q4_0, Q4_K)
SHORT_NAMES = {format.name: format.short for format in _MEASURED}
"""Names in a profile of the block formats that are measured."""
BYTES = {"fp32": 4.0, "bf16": 2.0} | {format.short: format.bits / 8 for format in _MEASURED}
"""Bytes per weight by the name of its format."""
OPS_PER_LAYER = 9
"""Number of operators in `ops.layer_ops`.

The measured time between a layer's operators is spread over them.
"""


@dataclass(frozen=True)
class Gpu:
    """One measured accelerator: bytes, bytes/s of a copy, bf16 operations/s, bytes/s to the next GPU."""

    name: str
    memory: int
    bandwidth: float
    bf16: float
    peer: float | None = None


@dataclass(frozen=True)
class Profile:
    """Measured speeds of one machine.

    ``between`` is the total time between the operators of a layer: for ``plain`` weights, and for ``packed``
    weights, where a layer is a single native operator.
    """

    key: str
    date: str
    cpu: str
    cores: int
    isa: tuple[str, ...]
    memory: int
    threads: int
    bandwidth: Mapping[int, float]  # bytes/s by threads
    gemm: Mapping[str, Mapping[int, float]]  # operations/s by weight format and rows
    attention_prefill: Mapping[str, float]  # operations/s by kind of KV cache
    attention_decode: Mapping[str, float]  # bytes/s of keys and values by kind of KV cache
    pointwise: float  # bytes/s
    between: Mapping[str, float]  # seconds
    encode: Mapping[str, float]  # weights/s rounded to blocks, by format
    hash: float  # bytes/s of SHA-256 on one thread
    hash_all: float  # on all threads
    disk: float | None  # bytes/s read past the page cache; None: could not be measured
    disk_write: float | None  # bytes/s written, including the flush to the disk
    base: int  # bytes of a process before it loads a model
    seconds: float  # duration of the measurement
    gpus: tuple[Gpu, ...] = ()

    @property
    def read(self) -> float:
        """Bytes/s read by all threads, in a plain loop or in a matmul of one row, whichever is faster."""
        rows = ((BYTES[name], rates[1]) for name, rates in self.gemm.items() if 1 in rates)
        return max([*self.bandwidth.values(), *(nbytes * rate / 2 for nbytes, rate in rows)])

    def device(self, weights: str = "plain") -> Device:
        """Return the processor as a roofline device. Its peaks are the best measured rates.

        ``weights`` is a key of ``between``.
        """
        peaks = {name: max(rates.values()) for name, rates in self.gemm.items()}
        shares = {name: {n: rate / peaks[name] for n, rate in by.items()} for name, by in self.gemm.items()}
        curves = {name: EfficiencyCurve.parse(by_rows) for name, by_rows in shares.items()}
        if "bf16" not in peaks:  # the dtype of operators that do not name one
            peaks["bf16"], curves["bf16"] = max(peaks.values()), EfficiencyCurve.flat(1.0)
        attention = max(self.attention_prefill.values()) / peaks["bf16"]
        memory, op_seconds = EfficiencyCurve.flat(1.0), self.between[weights] / OPS_PER_LAYER
        source, title = f"measured here, {self.date}", f"this machine: {self.cpu}, {self.cores} cores"
        efficiency = Efficiency(curves, memory, attention, attention, op_seconds, source)
        return Device("here", "cpu", float(self.memory), self.read, peaks, efficiency, 0.0, title, "measured")

    def machine(self) -> Machine:
        """Return this machine as an entry of the catalogue: a single device without links and prices."""
        return Machine("this machine", self.device(), 1, 1, NO_LINK, NO_LINK)


def profile_path() -> Path:
    return cache_folder() / "profile.json"


def machine_key() -> str:
    """Return a hash of everything a profile depends on: processor, memory, torch, threads, native kernels."""
    where = receipt.describe_machine()
    parts = [str(where[name]) for name in ("cpu", "cores", "isa", "memory_bytes", "torch")]
    digest = hashlib.sha256("\0".join([*parts, os.environ.get("OMP_NUM_THREADS", "")]).encode())
    native = Path(__file__).parent.parent / "kernels" / "native"
    for source in sorted(native.iterdir()):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def load_profile() -> Profile | None:
    """Return the saved profile of this machine, or None if there is none for its present state."""
    try:
        record = json.loads(profile_path().read_text(encoding="utf-8"))
        if record["schema"] != SCHEMA or record["key"] != machine_key():
            return None
        return TypeAdapter(Profile).validate_python(record)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def save_profile(profile: Profile) -> Path:
    """Write the profile where `load_profile` finds it, and return the path."""
    write_json(profile_path(), {"schema": SCHEMA} | asdict(profile))
    return profile_path()
