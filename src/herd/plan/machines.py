"""Machines by name: ``2xRTX4090``, ``16384xH100``, ``M2Ultra-192GB``, ``12xDDR5-4800``. Data in
``machines.yaml``.

A name is a device, with how many of them before it and, for Apple chips and processors, the memory it was
bought with behind it (as printed on the box, in 2^30 bytes). A processor that is not listed is its memory:
channels times the kind of memory. A user's own ``~/.config/herd/machines.yaml``, or a file given by name, has
the same sections as ours and replaces or adds entries; a mistake in it is one line that names the entry and
the field.
"""

from __future__ import annotations

import difflib
import functools
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from ..errors import PlanError
from .roofline import Device, Efficiency, EfficiencyCurve, Link

SECTIONS = ("links", "efficiencies", "devices", "parts")
MAX_DEVICES = 1_000_000


@dataclass(frozen=True)
class Price:
    """US dollars, an hour or once, with the month (YYYY-MM) and where the figure is from."""

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
    rent: tuple[Price, ...] = ()
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
        """What a group of ``ranks`` devices, every ``stride``-th, talks over: inside a node as long as it
        fits. Between nodes each device has a network card of its own, and members on the same node use theirs
        together."""
        if ranks * stride <= self.per_node:
            return self.link
        together = max(1, self.per_node // stride)
        return replace(self.network, bandwidth=min(self.link.bandwidth, together * self.network.bandwidth))

    def of(self, count: int) -> Machine:
        """The same with another number of devices."""
        return replace(self, count=count, name=_name(count, self.device.name))


@dataclass(frozen=True)
class Catalogue:
    """All machines that are known: sections of raw entries, checked when one is asked for."""

    links: Mapping[str, Any]
    efficiencies: Mapping[str, Any]
    devices: Mapping[str, Any]
    parts: Mapping[str, Any]

    def names(self) -> list[str]:
        return [*self.devices, *(f"12x{part}" for part in self.parts)]

    def device_names(self) -> list[str]:
        return list(self.devices)

    def link(self, name: str) -> Link:
        """A link by name. PlanError with the nearest names."""
        if name not in self.links:
            raise PlanError(f"link {name!r} is not known: {_near(name, self.links)}")
        entry = self.links[name]
        where = f"links: {name}"
        return Link(
            name,
            _number(entry, "bandwidth", where),
            _number(entry, "latency", where, least=0.0, strict=False),
            _number(entry, "efficiency", where),
            str(entry.get("source", "")),
        )

    def efficiency(self, name: str) -> Efficiency:
        """What a kind of chip reaches. PlanError with the nearest names."""
        if name not in self.efficiencies:
            raise PlanError(f"efficiency {name!r} is not known: {_near(name, self.efficiencies)}")
        entry, where = self.efficiencies[name], f"efficiencies: {name}"
        gemm = entry.get("gemm")
        if not isinstance(gemm, Mapping) or not gemm:
            raise PlanError(f"{where}: gemm must give a share for each dtype, like {{bf16: 0.7}}")
        return Efficiency(
            gemm={dtype: _curve(share, f"{where}: gemm {dtype}") for dtype, share in gemm.items()},
            memory=_curve(entry.get("memory"), f"{where}: memory"),
            attention_forward=_number(entry, "attention_forward", where),
            attention_backward=_number(entry, "attention_backward", where),
            op_seconds=_number(entry, "op_seconds", where, strict=False),
            source=str(entry.get("source", "")),
        )

    def device(self, name: str) -> Device:
        """A device by its exact name."""
        entry, where = self.devices[name], f"devices: {name}"
        kind = entry.get("kind")
        if kind not in ("gpu", "apple", "cpu"):
            raise PlanError(f"{where}: kind {kind!r} must be gpu, apple or cpu")
        return Device(
            name,
            kind,
            _number(entry, "memory", where),
            _number(entry, "bandwidth", where),
            _flops(entry, where),
            self.efficiency(entry.get("efficiency", kind)),
            _number(entry, "power", where, strict=False, default=0.0),
            str(entry.get("title", name)),
            str(entry.get("source", "")),
        )

    def machine(self, text: str) -> Machine:
        """The machine a user names. PlanError that says what to change, with the nearest names."""
        count, name = _split(text)
        part = _match(name, self.parts)
        if part is not None:
            return self._channels(part, count)
        name, gigabytes = self._device_name(text, name)
        entry, device, where = self.devices[name], self.device(name), f"devices: {name}"
        if gigabytes is not None:
            device = replace(device, memory=gigabytes * 2**30, name=f"{name}-{gigabytes}GB")
        per_node = int(_number(entry, "per_node", where, default=1))
        alone = "none" if per_node == 1 else "PCIe4x16"
        return Machine(
            _name(count, device.name),
            device,
            count,
            per_node,
            self.link(entry.get("link", alone)),
            self.link(entry.get("network", "Thunderbolt4" if device.kind == "apple" else "Ethernet-10G")),
            _prices(entry, "rent", where),
            _prices(entry, "buy", where),
            tuple(entry.get("approximate", ())),
        )

    def _channels(self, part: str, count: int) -> Machine:
        entry, where = self.parts[part], f"parts: {part}"
        name = _name(count, part)
        device = Device(
            name,
            "cpu",
            count * _number(entry, "memory", where),
            count * _number(entry, "bandwidth", where),
            {dtype: count * rate for dtype, rate in _flops(entry, where).items()},
            self.efficiency(entry.get("efficiency", "cpu")),
            title=f"a processor with {count} channels of {part}",
        )
        none = self.link("none")
        return Machine(name, device, 1, 1, none, none, approximate=("memory", "flops"))

    def _device_name(self, text: str, name: str) -> tuple[str, int | None]:
        found = _match(name, self.devices)
        if found is not None:
            return found, None
        sized = re.fullmatch(r"(.+?)[-_ ]?(\d+)\s*G(?:i?B)?", name, re.IGNORECASE)
        if sized:
            found = _match(sized[1], self.devices)
            if found is not None and self.devices[found].get("kind") in ("apple", "cpu") and int(sized[2]):
                return found, int(sized[2])
        turned = re.fullmatch(r"(.+?)\s*[x×*]\s*(\d+)", name)
        if turned and (found := _match(turned[1], self.devices)):
            raise PlanError(f"machine {text!r}: the number comes first, as in {turned[2]}x{found}")
        raise PlanError(
            f"machine {text!r} is not known: {_near(name, self.names())}, or add it to a machines.yaml"
        )


def catalogue(path: Path | str | None = None) -> Catalogue:
    """The shipped machines, the user's own on top, and the file ``path`` on top of these."""
    own = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "herd" / "machines.yaml"
    files = ([own] if own.is_file() else []) + ([Path(path)] if path is not None else [])
    merged = {section: dict(entries) for section, entries in _shipped().items()}
    for file in files:
        for section, entries in _read(file).items():
            merged[section] |= entries
    return Catalogue(**merged)


def find_machine(text: str, path: Path | str | None = None) -> Machine:
    """The machine a user names, e.g. ``find_machine("2xRTX4090")``."""
    return catalogue(path).machine(text)


@functools.cache
def _shipped() -> dict[str, dict[str, Any]]:
    return _read(Path(__file__).with_name("machines.yaml"))


def _read(path: Path) -> dict[str, dict[str, Any]]:
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


def _split(text: str) -> tuple[int, str]:
    match = re.fullmatch(r"\s*(?:(-?\d[\d,_]*)\s*[x×*]\s*)?(\S.*?)\s*", text)
    if not match:
        raise PlanError(f"machine {text!r} is empty: name one, like 2xRTX4090")
    count = int(re.sub("[,_]", "", match[1])) if match[1] else 1
    if not 1 <= count <= MAX_DEVICES:
        raise PlanError(f"machine {text!r} has {count:,} devices: give 1 to {MAX_DEVICES:,}")
    return count, match[2]


def _name(count: int, device: str) -> str:
    return device if count == 1 else f"{count}x{device}"


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower()).removeprefix("nvidia").removeprefix("geforce")


def _match(name: str, names: Mapping[str, Any]) -> str | None:
    wanted = _plain(name)
    return next(
        (known for known in names if wanted in (_plain(known), _plain(known).removeprefix("rtx"))), None
    )


def _near(name: str, names: Any) -> str:
    plain = {_plain(known): known for known in names}
    close = difflib.get_close_matches(_plain(name), plain, n=3, cutoff=0.4)
    holding = [key for key in plain if _plain(name) and (_plain(name) in key) and key not in close]
    found = [plain[key] for key in (*holding, *close)][:4]
    return (
        f"near it are {', '.join(found)}" if found else f"known are {', '.join(list(names)[:8])} and others"
    )


_REQUIRED: Any = object()


def _number(
    entry: Mapping[str, Any],
    key: str,
    where: str,
    *,
    least: float = 0.0,
    strict: bool = True,
    default: Any = _REQUIRED,
) -> float:
    """YAML reads 80e9 as text, so text that is a number counts as one."""
    value = entry.get(key, default)
    if value is _REQUIRED:
        raise PlanError(f"{where}: {key} is missing")
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise PlanError(f"{where}: {key}={value!r} is not a number") from None
    if not (number > least or (number == least and not strict)) or number == float("inf"):
        raise PlanError(f"{where}: {key}={value!r} must be {'above' if strict else 'at least'} {least:g}")
    return number


def _curve(share: Any, where: str) -> EfficiencyCurve:
    """A number, or a mapping from size to share."""
    if isinstance(share, Mapping):
        return EfficiencyCurve(tuple(sorted((float(size), float(value)) for size, value in share.items())))
    return EfficiencyCurve.flat(_number({"share": share}, "share", where))


def _flops(entry: Mapping[str, Any], where: str) -> dict[str, float]:
    flops = entry.get("flops")
    if not isinstance(flops, Mapping) or not flops:
        raise PlanError(f"{where}: flops must give operations/s by dtype, like {{bf16: 989e12}}")
    return {str(dtype): _number(flops, dtype, f"{where}: flops") for dtype in flops}


def _prices(entry: Mapping[str, Any], key: str, where: str) -> tuple[Price, ...]:
    """Newest first."""
    found = [
        Price(_number(item, "usd", f"{where}: {key}"), str(item.get("date", "")), str(item.get("source", "")))
        for item in entry.get(key, ())
    ]
    return tuple(sorted(found, key=lambda price: price.date, reverse=True))
