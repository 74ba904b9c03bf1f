"""Scores that others published, as data: what one's own measurement is put beside, and what the news was made of.

``published.yaml`` holds every figure with its source, its setting and whether the model was a base or an instruct one;
a score without these cannot be compared with anything. Torch-free, so that evaluations, reports and plans may all read
it. All scores are percent.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal

import yaml

from ..errors import ReportError

Kind = Literal["base", "instruct"]
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the same result, ten times sooner


@dataclass(frozen=True)
class PublishedSource:
    """Where figures come from: a title, where to find it, its date."""

    name: str
    title: str
    where: str
    date: str


@dataclass(frozen=True)
class Published:
    """One score in percent. ``shots`` None: the source names none. ``starred``: the source says that this model was run
    in another setting than its row."""

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
        """Shots, reasoning and metric in words: ``5-shot, chain of thought, exact match``."""
        parts = [
            f"{self.shots}-shot" if self.shots else "",
            "chain of thought" if self.cot else "",
            self.metric,
        ]
        return ", ".join(part for part in parts if part) + (" (another setting)" if self.starred else "")


@functools.cache
def published() -> tuple[Published, ...]:
    """Every published score, in the order of the file."""
    return tuple(_parse(read_yaml("herd.report", "published.yaml")))


def find_published(
    *, task: str | None = None, model: str | None = None, kind: Kind | None = None, source: str | None = None
) -> list[Published]:
    """The scores that agree with everything given."""
    return [
        row
        for row in published()
        if task in (None, row.task)
        and model in (None, row.model)
        and kind in (None, row.kind)
        and source in (None, row.source.name)
    ]


def published_score(task: str, model: str, *, kind: Kind, source: str) -> float:
    """One score in percent. `ReportError`, with the nearest names, where there is none."""
    rows = find_published(task=task, model=model, kind=kind, source=source)
    if rows:
        return rows[0].score
    for what, name, names in (
        ("task", task, {row.task for row in published()}),
        ("model", model, {row.model for row in published()}),
        ("source", source, {row.source.name for row in published()}),
    ):
        if name not in names:
            near = difflib.get_close_matches(name, sorted(names), n=3, cutoff=0.3) or sorted(names)
            raise ReportError(f"no published score has the {what} {name!r}: nearest are {', '.join(near)}")
    raise ReportError(f"{source} has no score of {model} ({kind}) on {task}")


def read_yaml(package: str, name: str) -> Any:
    """A YAML file that lies inside a package."""
    return yaml.load(resources.files(package).joinpath(name).read_text(encoding="utf-8"), Loader=_LOADER)


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
                yield Published(
                    task=row["task"],
                    model=model,
                    kind=table["kind"],
                    score=float(str(value).removesuffix("*")),
                    metric=row["metric"],
                    source=sources[table["source"]],
                    shots=str(row["shots"]) if "shots" in row else None,
                    cot=row.get("cot", False),
                    starred=str(value).endswith("*"),
                )
