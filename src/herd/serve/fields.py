"""The one table of request fields: what becomes of each field of each API (`fields.yaml`).

A client must be able to trust that a field works or that it is told. So a field is honoured, accepted without
effect because nothing depends on it, accepted with a warning, or refused by name. A field that the API does
not have gives a warning with the nearest name that it has.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from ..package_yaml import package_yaml
from .problems import BadRequest

Effect = Literal["honoured", "silent", "warned", "refused"]
MAX_WARNINGS = 32
"""Warnings of one response. A body may have any number of unknown fields."""
WITHHELD = "withheld"
_PASSING_APIS = ("chat", "completions", "embeddings")
"""APIs that other servers have too, so that their unknown fields can be passed on."""


@dataclass(frozen=True)
class RequestField:
    """A field of an API and what becomes of it. ``harmless`` values are accepted without effect.

    ``passes``: a model of another server gets it as it is.
    """

    api: str
    name: str
    effect: Effect
    reason: str = ""
    harmless: tuple[Any, ...] = ()
    example: Any = None
    passes: bool = False


@cache
def field_table() -> Mapping[str, Mapping[str, RequestField]]:
    """Return the fields of every API by name."""
    apis = {api: classes for api, classes in _tables().items() if api != WITHHELD}
    return {api: {each.name: each for each in _rows(api, classes)} for api, classes in apis.items()}


@cache
def _tables() -> dict[str, Any]:
    tables: dict[str, Any] = package_yaml(__package__, "fields.yaml")
    return tables


def _rows(api: str, classes: dict[str, Any]) -> Iterator[RequestField]:
    for name in classes.get("honoured", ()):
        yield RequestField(api, name, "honoured")
    effects: tuple[Effect, ...] = ("silent", "warned", "refused")
    for effect in effects:
        for name, about in classes.get(effect, {}).items():
            about = dict(about, harmless=tuple(about.get("harmless", ())))
            yield RequestField(api, name, effect, **about)


def sort_fields(
    api: str, body: Mapping[str, Any], *, strict: bool = False, is_upstream: bool = False
) -> tuple[dict[str, Any], list[str]]:
    """Return the honoured fields of a body, and warnings about others (``name=reason``).

    With ``is_upstream`` (the model is on another server), fields to pass on are returned too. Raises
    `BadRequest` for a refused field, and with ``strict`` for an unknown one.
    """
    table = field_table()[api]
    withheld = _tables()[WITHHELD]
    passes_unknown = is_upstream and not strict and api in _PASSING_APIS
    honoured: dict[str, Any] = {}
    warnings: list[str] = []
    for name, value in body.items():
        row = table.get(name)
        if row is not None and row.effect == "honoured":
            honoured[name] = value
        elif value is None:
            continue
        elif row.passes and is_upstream if row is not None else passes_unknown and name not in withheld:
            honoured[name] = value
        elif row is None:
            hint = _nearest(name, table) if len(warnings) < MAX_WARNINGS else ""
            if strict:
                raise BadRequest(f"{name[:80]}: unknown field{hint}", param=name)
            warnings.append(f"{name[:80]}=unknown field, ignored{hint}")
        elif row.effect == "silent" or value in row.harmless:
            continue
        elif row.effect == "refused":
            raise BadRequest(f"{name} is not supported: {row.reason}", param=name)
        else:
            warnings.append(f"{name}={row.reason}")
    if (n_more := len(warnings) - MAX_WARNINGS) > 0:
        warnings[MAX_WARNINGS:] = [f"and {n_more} more"]
    return honoured, warnings


def _nearest(name: str, table: Mapping[str, RequestField]) -> str:
    nearest = difflib.get_close_matches(name[:80], table, n=1, cutoff=0.7)
    return f"; did you mean {nearest[0]}?" if nearest else ""
