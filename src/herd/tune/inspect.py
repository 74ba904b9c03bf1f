"""Show what a model will see of a user's files: every token with its mask, document and position.

Rows are those of training: examples are packed, and each is a document of its own with positions from 0. A
token is marked as trained if the model learns to predict it. The last token of a document is only predicted,
never read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..data.packing import DialogStream
from ..data.pairs import PairStream
from ..data.tuning import TuningRows
from ..files import write_atomically
from ..report.template import template
from ..text import Rendered, Tokenizer
from ..text.visible import visible
from ..train.sources.base import padding

_GREEN, _PLAIN = "\033[32m", "\033[0m"


@dataclass(frozen=True)
class SeenToken:
    """A token of a document. ``trained``: it is a target of the loss."""

    id: int
    text: str
    trained: bool
    position: int


@dataclass(frozen=True)
class SeenDocument:
    """A document of a packed row: the numbers of row and document, its source, and its tokens."""

    row: int
    document: int
    where: str
    tokens: list[SeenToken]

    @property
    def n_trained(self) -> int:
        """The number of tokens that are trained."""
        return sum(token.trained for token in self.tokens)


def seen_documents(data: TuningRows, tokenizer: Tokenizer, context: int, n_rows: int) -> list[SeenDocument]:
    """Return the documents of the first ``n_rows`` packed rows, without padding."""
    members: list[list[tuple[str, Rendered]]]
    if data.pairs and not data.examples:
        packed = PairStream(data.pairs, context, 0, pad_id=padding(tokenizer)).rows
        both = [
            [(f"{pair.where} chosen", pair.chosen), (f"{pair.where} rejected", pair.rejected)]
            for pair in data.pairs
        ]
        members = [[answer for member in row for answer in both[member]] for row in packed]
    else:
        examples = data.require_examples()
        rendered = [example.rendered for example in examples]
        packed = DialogStream(rendered, context, 0, pad_id=padding(tokenizer)).rows
        members = [[(examples[member].where, rendered[member]) for member in row] for row in packed]
    return [
        SeenDocument(row, document, where, _tokens(rendered, tokenizer))
        for row, documents in enumerate(members[:n_rows])
        for document, (where, rendered) in enumerate(documents)
    ]


def _tokens(rendered: Rendered, tokenizer: Tokenizer) -> list[SeenToken]:
    return [
        SeenToken(
            id_,
            tokenizer.token_bytes(id_).decode("utf-8", "backslashreplace"),
            trained and position > 0,
            position,
        )
        for position, (id_, trained) in enumerate(zip(rendered.ids, rendered.mask, strict=True))
    ]


def as_text(documents: Sequence[SeenDocument], *, colour: bool) -> str:
    """Return the documents for a terminal: tokens divided by ``|``, trained ones in green or in ``[[ ]]``."""
    start, end = (_GREEN, _PLAIN) if colour else ("[[", "]]")
    lines = []
    for seen in documents:
        lines.append(_title(seen))
        parts: list[str] = []
        before = False
        for token in seen.tokens:
            if token.trained != before:
                parts.append(start if token.trained else end)
            parts.append(visible(token.text) + "|")
            before = token.trained
        lines.append("".join(parts) + (end if before else "") + "\n")
    return "\n".join(lines)


def write_page(path: Path, documents: Sequence[SeenDocument], model: str) -> None:
    """Write the documents as one HTML file without scripts."""
    titles = [_title(seen) for seen in documents]
    page = template("herd.tune", "inspect.html.jinja")
    write_atomically(path, page.render(model=model, documents=list(zip(titles, documents, strict=True))))


def _title(seen: SeenDocument) -> str:
    n = len(seen.tokens)
    return f"row {seen.row}, document {seen.document}: {seen.where}: {n:,} tokens, {seen.n_trained:,} trained"
