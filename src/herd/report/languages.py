"""The order and the English names of languages in tables and charts."""

from __future__ import annotations

from collections.abc import Iterable

# fmt: off
LANGUAGES = {
    "en": "English", "de": "German", "fr": "French", "it": "Italian", "pt": "Portuguese", "hi": "Hindi",
    "es": "Spanish", "th": "Thai", "ja": "Japanese", "bn": "Bengali", "ru": "Russian", "sw": "Swahili",
    "te": "Telugu", "zh": "Chinese",
}
# fmt: on
"""The eight languages of Llama 3.1 in the order of its model card, then languages of the benchmarks."""


def in_order(codes: Iterable[str]) -> list[str]:
    """Return the codes without repeats, languages first, in the order of `LANGUAGES`."""
    known = {code: index for index, code in enumerate(LANGUAGES)}
    return sorted(dict.fromkeys(codes), key=lambda code: known.get(code, len(known)))


def language(code: str) -> str:
    """Return the English name of a language. Other codes, such as "code", are returned unchanged."""
    return LANGUAGES.get(code, code)
