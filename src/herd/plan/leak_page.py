"""The claims of the news as one HTML page without scripts or anything to load."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from ..report.template import template
from .leak import Claim

TONES = {"true": "good", "half true": "other", "misread": "other", "false": "bad"}


def page(claims: Sequence[Claim]) -> str:
    """The whole page."""
    verdicts = Counter(claim.verdict for claim in claims)
    counts = [(verdict, verdicts[verdict]) for verdict in TONES if verdicts[verdict]]  # type: ignore[index]
    return template("herd.plan", "leak.html.jinja").render(claims=claims, tones=TONES, counts=counts)
