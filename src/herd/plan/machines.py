"""Machines by name: ``2xRTX4090``, ``16384xH100``, ``M2Ultra-192GB``, ``12xDDR5-4800``.

A name is a number of devices and a device. For Apple chips and processors the size of the memory may follow,
as printed on the box (in GiB). A processor that is not listed is described by its memory: the number of
channels and the kind of memory. A user's own ``~/.config/herd/machines.yaml``, or a file given by name, has
the same sections and replaces or adds entries. A mistake in such a file is reported in one line that names
the entry and the field.
"""

from __future__ import annotations

import difflib
import functools
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BeforeValidator, TypeAdapter, ValidationError

from ..errors import PlanError
from ..package_yaml import package_yaml
from ..train.recipe_yaml import read_yaml
from .roofline import NO_LINK, Device, Efficiency, Link, Positive

T = TypeVar("T")

SECTIONS = ("links", "efficiencies", "devices", "parts")
MAX_DEVICES = 1_000_000


@dataclass(frozen=True)
class Price:
    """A price in US dollars, per hour or once, with the month (YYYY-MM) and the source of the figure."""

    usd: Positive
    date: Annotated[str, BeforeValidator(str)] = ""
    source: str = ""


def _newest_first(prices: tuple[Price, ...]) -> tuple[Price, ...]:
    return tuple(sorted(prices, key=lambda price: price.date, reverse=True))


Prices = Annotated[tuple[Price, ...], AfterValidator(_newest_first)]


@dataclass(frozen=True)
class Machine:
    """``count`` devices, ``per_node`` of them joined by ``link``, nodes joined by ``network``.

    Prices per device.
    """

    name: str
    device: Device
    count: int
    per_node: int
    link: Link
    network: Link
    rent: Prices = ()  # newest first
    buy: Prices = ()
    approximate: tuple[str, ...] = ()

    @property
    def nodes(self) -> int:
        return -(-self.count // self.per_node)

    @property
    def memory(self) -> float:
        """Bytes of all devices together."""
        return self.device.memory * self.count

    def join(self, ranks: int, stride: int = 1) -> Link:
        """Return the link between ``ranks`` devices that are ``stride`` apart.

        Between nodes, each device has its own network card, and the members of a group on one node use their
        cards together.
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
    """All known machines, as sections of raw entries. An entry is checked when it is looked up."""

    links: Mapping[str, Any]
    efficiencies: Mapping[str, Any]
    devices: Mapping[str, Any]
    parts: Mapping[str, Any]

    def link(self, name: str) -> Link:
        """Return a link by name. Raises `PlanError` with similar names if it is unknown."""
        return _checked(Link, "links", name, _entry("links", name, self.links))

    def efficiency(self, name: str) -> Efficiency:
        """Return the efficiency of a kind of chip. Raises `PlanError` with similar names if it is unknown."""
        return _checked(Efficiency, "efficiencies", name, _entry("efficiencies", name, self.efficiencies))

    def device(self, name: str) -> Device:
        """Return a device by its exact name."""
        return self._device("devices", name, _entry("devices", name, self.devices))

    def _device(self, section: str, name: str, entry: Mapping[str, Any]) -> Device:
        kind = entry.get("kind")
        if kind not in ("gpu", "apple", "cpu"):
            raise PlanError(f"{section}: {name}: kind {kind!r} must be gpu, apple or cpu")
        efficiency = self.efficiency(str(entry.get("efficiency", kind)))
        return _checked(Device, section, name, {**entry, "efficiency": efficiency})

    def machine(self, text: str) -> Machine:
        """Return the machine with this name. Raises `PlanError` with similar names if it is unknown."""
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
        entry, device = self.devices[name], self.device(name)
        if gibibytes is not None:
            device = replace(device, memory=gibibytes * 2**30, name=f"{name}-{gibibytes}GB")
        own = {"name": _counted(count, device.name), "device": device, "count": count, "per_node": 1}
        network = "Thunderbolt4" if device.kind == "apple" else "Ethernet-10G"
        links = {
            "link": self.link(entry.get("link", "none" if entry.get("per_node", 1) == 1 else "PCIe4x16")),
            "network": self.link(entry.get("network", network)),
        }
        return _checked(Machine, "devices", name, own | entry | links)

    def _memory_channels(self, part: str, count: int) -> Machine:
        values = {"kind": "cpu", "title": f"a processor with {count} channels of {part}", **self.parts[part]}
        one = self._device("parts", part, values)
        name, flops = _counted(count, part), {dtype: count * rate for dtype, rate in one.flops.items()}
        memory, bandwidth = count * one.memory, count * one.bandwidth
        device = replace(one, name=name, memory=memory, bandwidth=bandwidth, flops=flops)
        return Machine(name, device, 1, 1, NO_LINK, NO_LINK, approximate=("memory", "flops"))

    def _device_name(self, text: str, name: str) -> tuple[str, int | None]:
        """Return (name of the device, GiB of memory or None)."""
        if found := _match(name, self.devices):
            return found, None
        sized = re.fullmatch(r"(.+?)[-_ ]?(\d{1,9})\s*G(?:i?B)?", name, re.IGNORECASE)
        found = _match(sized[1], self.devices) if sized else None
        if sized and found and int(sized[2]) and self.devices[found].get("kind") in ("apple", "cpu"):
            return found, int(sized[2])
        turned = re.fullmatch(r"(.+?)\s*[x×*]\s*(\d+)", name)
        if turned and (found := _match(turned[1], self.devices)):
            raise PlanError(f"machine {text!r}: write the number first, as in {turned[2]}x{found}")
        known = [*self.devices, *(f"12x{part}" for part in self.parts)]
        raise PlanError(f"machine {text!r} is unknown: {_nearest(name, known)}, or add it to a machines.yaml")


def _entry(section: str, name: str, entries: Mapping[str, Any]) -> dict[str, Any]:
    if name not in entries:
        kind = "efficiency" if section == "efficiencies" else section.removesuffix("s")
        raise PlanError(f"{kind} {name!r} is not known: {_nearest(name, entries)}")
    return entries[name]


def _checked(kind: type[T], section: str, name: str, values: Mapping[str, Any]) -> T:
    """Return an object of class ``kind`` with an entry's values.

    Raises `PlanError` that names the entry and the field. PyYAML reads 80e9 as text, so text is converted to
    numbers.
    """
    try:
        return TypeAdapter(kind).validate_python({"name": name, **values})
    except ValidationError as error:
        first = error.errors()[0]
        field, given = ".".join(map(str, first["loc"])), first["input"]
        shown = "" if first["type"] == "missing" else f"={given!r}"
        raise PlanError(f"{section}: {name}: {field}{shown}: {first['msg']}") from None


def read_catalogue(path: Path | str | None = None) -> Catalogue:
    """Return Herd's catalogue with the changes and additions of the user's own file and then of ``path``."""
    own = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "herd" / "machines.yaml"
    files = ([own] if own.is_file() else []) + ([Path(path)] if path is not None else [])
    merged = {section: dict(entries) for section, entries in _shipped().items()}
    for file in files:
        for section, entries in _read_file(file).items():
            merged[section] |= entries
    return Catalogue(**merged)


def find_machine(text: str, path: Path | str | None = None) -> Machine:
    """Return a machine by name, e.g. ``find_machine("2xRTX4090")``."""
    return read_catalogue(path).machine(text)


@functools.cache
def _shipped() -> dict[str, dict[str, Any]]:
    return package_yaml(__package__, "machines.yaml")


def _read_file(path: Path) -> dict[str, dict[str, Any]]:
    try:
        data, _ = read_yaml(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise PlanError(f"machines file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise PlanError(f"machines file {path}: not UTF-8 text at byte {error.start}") from error
    if not isinstance(data, dict) or not set(data) <= set(SECTIONS):
        raise PlanError(f"machines file {path}: the sections must be among {', '.join(SECTIONS)}")
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
    return f"known names are {', '.join(list(plain.values())[:8])} and others"
