"""The claims of the news as one HTML page without scripts or anything to load."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from ..report import palette
from .leak import Claim

TONES = {"true": "good", "half true": "other", "misread": "other", "false": "bad"}
_CSS = """
body { background: var(--paper); color: var(--ink); font: 16px/1.55 ui-sans-serif, system-ui, sans-serif;
  max-width: 46rem; margin: 3rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin: 0; }
article { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 1rem 1.25rem;
  margin: 1rem 0; }
header { display: flex; gap: 1rem; justify-content: space-between; align-items: baseline; }
.verdict { font-weight: 650; white-space: nowrap; }
table { width: 100%; border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
td { border-top: 1px solid var(--grid); padding: .2rem 0; vertical-align: top; }
td:last-child { text-align: right; white-space: nowrap; padding-left: 1rem; }
small { color: var(--soft); } code { font-family: ui-monospace, monospace; }
"""


def page(claims: Sequence[Claim]) -> str:
    """The whole page."""
    light, dark = palette.variables(palette.LIGHT), palette.variables(palette.DARK)
    style = f":root {{ {light} }} @media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}{_CSS}"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>The Llama 3.1 leak, claim by claim</title><style>{style}</style></head><body>"
        "<h1>The Llama 3.1 leak, claim by claim</h1>"
        "<p>Every figure is computed from the models’ shapes, published scores and prices with their dates, or "
        f"measured with Meta’s tokenizer.</p>{''.join(map(_article, claims))}</body></html>\n"
    )


def _article(claim: Claim) -> str:
    rows = "".join(f"<tr><td>{escape(what)}</td><td>{escape(value)}</td></tr>" for what, value in claim.arithmetic)
    return (
        f'<article id="{claim.key}"><header><h2>“{escape(claim.said)}”</h2>'
        f'<span class="verdict" style="color: var(--{TONES[claim.verdict]})">{claim.verdict}</span></header>'
        f"<p>{escape(claim.answer)}</p><table>{rows}</table>"
        f"<p><small>{escape('; '.join(claim.sources))}</small><br>"
        f"See for yourself: <code>{escape(claim.see)}</code></p>"
        "</article>"
    )
