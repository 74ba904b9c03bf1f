"""Read published scores of models, to compare measurements and claims with them.

``published.yaml`` has every score with its source, its setting, and the kind of model (base or instruct),
since a score without these cannot be compared with anything. All scores are in percent. Does not import
torch.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import ReportError
from ..package_yaml import package_yaml

Kind = Literal["base", "instruct"]


@dataclass(frozen=True)
class PublishedSource:
    """A publication: its title, its address (``where``), and its date."""

    name: str
    title: str
    where: str
    date: str


@dataclass(frozen=True)
class Published:
    """A score in percent. ``shots`` is None if the source does not state it.

    ``starred``: according to the source, the setting of this model differs from the others in its row.
    """

    task: str
    model: str
    kind: Kind
    score: float
    metric: str
    source: PublishedSource
    shots: str | None = None
    cot: bool = False
    starred: bool = False

    @property
    def setting(self) -> str:
        """The setting in words: ``5-shot, chain of thought, exact match``."""
        shots, thought = f"{self.shots}-shot" if self.shots else "", "chain of thought" if self.cot else ""
        parts = [shots, thought, self.metric]
        return ", ".join(part for part in parts if part) + (" (another setting)" if self.starred else "")


@functools.cache
def published() -> tuple[Published, ...]:
    """Return every published score, in the order of the file."""
    return tuple(_parse(package_yaml(__package__, "published.yaml")))


def find_published(
    *, task: str | None = None, model: str | None = None, kind: Kind | None = None, source: str | None = None
) -> list[Published]:
    """Return the scores that match all arguments that are not None."""
    return [
        row
        for row in published()
        if task in (None, row.task)
        and model in (None, row.model)
        and kind in (None, row.kind)
        and source in (None, row.source.name)
    ]


def published_score(task: str, model: str, *, kind: Kind, source: str) -> float:
    """Return a score in percent. Raises `ReportError`, with the most similar names, if there is none."""
    rows = find_published(task=task, model=model, kind=kind, source=source)
    if rows:
        return rows[0].score
    for field, name, names in (
        ("task", task, {row.task for row in published()}),
        ("model", model, {row.model for row in published()}),
        ("source", source, {row.source.name for row in published()}),
    ):
        if name not in names:
            near = difflib.get_close_matches(name, sorted(names), n=3, cutoff=0.3) or sorted(names)
            raise ReportError(f"no published score has the {field} {name!r}: use e.g. {', '.join(near)}")
    raise ReportError(f"{source} has no score of {model} ({kind}) on {task}")


def _parse(data: dict[str, Any]) -> Iterable[Published]:
    sources = {
        name: PublishedSource(name, fields["title"], fields["where"], str(fields["date"]))
        for name, fields in data["sources"].items()
    }
    for table in data["tables"]:
        for row in table["rows"]:
            for model, value in zip(table["models"], row["scores"], strict=True):
                if value is None:
                    continue
                score, starred = float(str(value).removesuffix("*")), str(value).endswith("*")
                shots = str(row["shots"]) if "shots" in row else None
                how = (row["metric"], sources[table["source"]], shots, row.get("cot", False), starred)
                yield Published(row["task"], model, table["kind"], score, *how)
