"""Machines by name: ``2xRTX4090``, ``16384xH100``, ``M2Ultra-192GB``, ``12xDDR5-4800``.

A name is a device, preceded by how many of them there are. For Apple chips and processors the size of the
memory may follow, as printed on the box (in GiB). A processor that is not listed is described by its memory:
the number of channels and the kind of memory. A user's own ``~/.config/herd/machines.yaml``, or a file given
by name, has the same sections and replaces or adds entries. A mistake in it is reported in one line that
names the entry and the field.
"""

from __future__ import annotations

import difflib
import functools
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from ..errors import PlanError
from .roofline import NO_LINK, Device, Efficiency, EfficiencyCurve, Link

SECTIONS = ("links", "efficiencies", "devices", "parts")
MAX_DEVICES = 1_000_000


@dataclass(frozen=True)
class Price:
    """US dollars, per hour or once, with the month (YYYY-MM) and the source of the figure."""

    usd: float
    date: str
    source: str


@dataclass(frozen=True)
class Machine:
    """``count`` devices, ``per_node`` of them on ``link``, nodes on ``network``; prices of one device."""

    name: str
    device: Device
    count: int
    per_node: int
    link: Link
    network: Link
    rent: tuple[Price, ...] = ()  # newest first
    buy: tuple[Price, ...] = ()
    approximate: tuple[str, ...] = ()

    @property
    def nodes(self) -> int:
        return -(-self.count // self.per_node)

    @property
    def memory(self) -> float:
        """Bytes of all devices together."""
        return self.device.memory * self.count

    def join(self, ranks: int, stride: int = 1) -> Link:
        """Return the link of a group of ``ranks`` devices, every ``stride``-th one.

        Between nodes each device has its own network card, and members on the same node use theirs together.
        """
        if ranks * stride <= self.per_node:
            return self.link
        together = max(1, self.per_node // stride)
        return replace(self.network, bandwidth=min(self.link.bandwidth, together * self.network.bandwidth))

    def with_devices(self, count: int) -> Machine:
        """Return the same machine with another number of devices."""
        return replace(self, count=count, name=_counted(count, self.device.name))


@dataclass(frozen=True)
class Catalogue:
    """All known machines: sections of raw entries, which are checked when one is asked for."""

    links: Mapping[str, Any]
    efficiencies: Mapping[str, Any]
    devices: Mapping[str, Any]
    parts: Mapping[str, Any]

    def link(self, name: str) -> Link:
        """Return a link by name. Raises PlanError with the nearest names."""
        entry = _Entry.of("links", name, self.links)
        return Link(
            name,
            entry.number("bandwidth"),
            entry.number("latency", zero=True),
            entry.number("efficiency"),
            entry.text("source"),
        )

    def efficiency(self, name: str) -> Efficiency:
        """Return the efficiency of a kind of chip. Raises PlanError with the nearest names."""
        entry = _Entry.of("efficiencies", name, self.efficiencies)
        return Efficiency(
            gemm={dtype: entry.curve(share, f"gemm {dtype}") for dtype, share in entry.table("gemm").items()},
            memory=entry.curve(entry.values.get("memory"), "memory"),
            attention_forward=entry.number("attention_forward"),
            attention_backward=entry.number("attention_backward"),
            op_seconds=entry.number("op_seconds", zero=True),
            source=entry.text("source"),
        )

    def device(self, name: str) -> Device:
        """Return a device by its exact name."""
        entry = _Entry.of("devices", name, self.devices)
        kind = entry.values.get("kind")
        if kind not in ("gpu", "apple", "cpu"):
            raise PlanError(f"{entry.where}: kind {kind!r} must be gpu, apple or cpu")
        return Device(
            name,
            kind,
            entry.number("memory"),
            entry.number("bandwidth"),
            entry.flops(),
            self.efficiency(entry.text("efficiency", kind)),
            entry.number("power", 0.0, zero=True),
            entry.text("title", name),
            entry.text("source"),
        )

    def machine(self, text: str) -> Machine:
        """Return the machine a user names. Raises PlanError with the nearest names and what to change."""
        match = re.fullmatch(r"\s*(?:(-?\d[\d,_]{0,20})\s*[x×*]\s*)?(\S.*?)\s*", text)
        if not match:
            raise PlanError(f"machine {text!r} is empty: name one, like 2xRTX4090")
        count = int(re.sub("[,_]", "", match[1])) if match[1] else 1
        if not 1 <= count <= MAX_DEVICES:
            raise PlanError(f"machine {text!r} has {count:,} devices: give 1 to {MAX_DEVICES:,}")
        part = _match(match[2], self.parts)
        if part is not None:
            return self._memory_channels(part, count)
        name, gibibytes = self._device_name(text, match[2])
        entry, device = _Entry.of("devices", name, self.devices), self.device(name)
        if gibibytes is not None:
            device = replace(device, memory=gibibytes * 2**30, name=f"{name}-{gibibytes}GB")
        per_node = int(entry.number("per_node", 1))
        return Machine(
            _counted(count, device.name),
            device,
            count,
            per_node,
            self.link(entry.text("link", "none" if per_node == 1 else "PCIe4x16")),
            self.link(entry.text("network", "Thunderbolt4" if device.kind == "apple" else "Ethernet-10G")),
            entry.prices("rent"),
            entry.prices("buy"),
            tuple(entry.values.get("approximate", ())),
        )

    def _memory_channels(self, part: str, count: int) -> Machine:
        entry, name = _Entry.of("parts", part, self.parts), _counted(count, part)
        device = Device(
            name,
            "cpu",
            count * entry.number("memory"),
            count * entry.number("bandwidth"),
            {dtype: count * rate for dtype, rate in entry.flops().items()},
            self.efficiency(entry.text("efficiency", "cpu")),
            title=f"a processor with {count} channels of {part}",
        )
        return Machine(name, device, 1, 1, NO_LINK, NO_LINK, approximate=("memory", "flops"))

    def _device_name(self, text: str, name: str) -> tuple[str, int | None]:
        """Return (device, GiB of memory if given)."""
        if found := _match(name, self.devices):
            return found, None
        sized = re.fullmatch(r"(.+?)[-_ ]?(\d{1,9})\s*G(?:i?B)?", name, re.IGNORECASE)
        found = _match(sized[1], self.devices) if sized else None
        if sized and found and int(sized[2]) and self.devices[found].get("kind") in ("apple", "cpu"):
            return found, int(sized[2])
        turned = re.fullmatch(r"(.+?)\s*[x×*]\s*(\d+)", name)
        if turned and (found := _match(turned[1], self.devices)):
            raise PlanError(f"machine {text!r}: the number comes first, as in {turned[2]}x{found}")
        known = [*self.devices, *(f"12x{part}" for part in self.parts)]
        raise PlanError(
            f"machine {text!r} is not known: {_nearest(name, known)}, or add it to a machines.yaml"
        )


@dataclass(frozen=True)
class _Entry:
    """One entry of a machines file; ``where`` names it in error messages."""

    where: str
    values: Mapping[str, Any]

    @classmethod
    def of(cls, section: str, name: str, entries: Mapping[str, Any]) -> _Entry:
        if name not in entries:
            kind = "efficiency" if section == "efficiencies" else section.removesuffix("s")
            raise PlanError(f"{kind} {name!r} is not known: {_nearest(name, entries)}")
        return cls(f"{section}: {name}", entries[name])

    def text(self, key: str, default: str = "") -> str:
        return str(self.values.get(key, default))

    def number(self, key: str, default: float | None = None, *, zero: bool = False) -> float:
        """Return a positive number, or also zero. YAML reads 80e9 as text, so text is converted."""
        value = self.values.get(key, default)
        if value is None:
            raise PlanError(f"{self.where}: {key} is missing")
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise PlanError(f"{self.where}: {key}={value!r} is not a number") from None
        if not (number > 0 or (zero and number == 0)) or math.isinf(number):
            raise PlanError(f"{self.where}: {key}={value!r} must be {'at least' if zero else 'above'} 0")
        return number

    def table(self, key: str) -> Mapping[str, Any]:
        table = self.values.get(key)
        if not isinstance(table, Mapping) or not table:
            raise PlanError(f"{self.where}: {key} must give a number for each dtype, like {{bf16: 1}}")
        return table

    def flops(self) -> dict[str, float]:
        """Return the operations/s by dtype."""
        table = _Entry(f"{self.where}: flops", self.table("flops"))
        return {str(dtype): table.number(dtype) for dtype in table.values}

    def curve(self, share: Any, what: str) -> EfficiencyCurve:
        """Return the curve of a number, or of a mapping from size to share."""
        if isinstance(share, Mapping):
            return EfficiencyCurve(tuple(sorted((float(size), float(at)) for size, at in share.items())))
        return EfficiencyCurve.flat(_Entry(f"{self.where}: {what}", {"share": share}).number("share"))

    def prices(self, key: str) -> tuple[Price, ...]:
        """Return the prices, newest first."""
        items = [_Entry(f"{self.where}: {key}", item) for item in self.values.get(key, ())]
        found = [Price(item.number("usd"), item.text("date"), item.text("source")) for item in items]
        return tuple(sorted(found, key=lambda price: price.date, reverse=True))


def read_catalogue(path: Path | str | None = None) -> Catalogue:
    """Return Herd's machines, replaced or added to by the user's own file and then by ``path``."""
    own = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "herd" / "machines.yaml"
    files = ([own] if own.is_file() else []) + ([Path(path)] if path is not None else [])
    merged = {section: dict(entries) for section, entries in _shipped().items()}
    for file in files:
        for section, entries in _read_file(file).items():
            merged[section] |= entries
    return Catalogue(**merged)


def find_machine(text: str, path: Path | str | None = None) -> Machine:
    """Return the machine a user names, e.g. ``find_machine("2xRTX4090")``."""
    return read_catalogue(path).machine(text)


@functools.cache
def _shipped() -> dict[str, dict[str, Any]]:
    return _read_file(Path(__file__).with_name("machines.yaml"))


def _read_file(path: Path) -> dict[str, dict[str, Any]]:
    try:
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        data = yaml.load(path.read_text(encoding="utf-8"), loader)
    except OSError as error:
        raise PlanError(f"machines file {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise PlanError(f"machines file {path} is not YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(data, dict) or not set(data) <= set(SECTIONS):
        raise PlanError(f"machines file {path}: its sections must be among {', '.join(SECTIONS)}")
    for section, entries in data.items():
        if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
            raise PlanError(f"machines file {path}: {section} must hold named entries")
    return data


def _counted(count: int, device: str) -> str:
    return device if count == 1 else f"{count}x{device}"


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower()).removeprefix("nvidia").removeprefix("geforce")


def _match(name: str, names: Iterable[str]) -> str | None:
    wanted = _plain(name)
    return next(
        (known for known in names if wanted in (_plain(known), _plain(known).removeprefix("rtx"))), None
    )


def _nearest(name: str, names: Iterable[str]) -> str:
    plain = {_plain(known): known for known in names}
    close = difflib.get_close_matches(_plain(name), plain, n=3, cutoff=0.4)
    containing = [key for key in plain if _plain(name) and _plain(name) in key and key not in close]
    found = [plain[key] for key in (*containing, *close)][:4]
    if found:
        return f"similar names are {', '.join(found)}"
    return f"known are {', '.join(list(plain.values())[:8])} and others"
