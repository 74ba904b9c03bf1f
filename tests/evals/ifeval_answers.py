"""Answers that follow IFEval's instructions, made from the instructions themselves: no sense, but every rule kept.

What proves the checkers of `ifeval` without a model: for each item of the data set there is an answer they accept.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from herd.evals.guess_language import OWN_LETTERS, SCRIPTS, WORDS, script_of
from herd.evals.ifeval import OPTIONS, follows, sentences

_WORDS = ("the", "and", "of", "to", "so", "we", "up", "go", "by", "myth", "lynx", "zoo")


def satisfying(instructions: Sequence[str], kwargs: Sequence[Mapping[str, Any]]) -> str:
    """An answer that follows all of them, unless they contradict each other or the prompt that is to be repeated."""
    wanted = _Wanted(list(zip(instructions, kwargs, strict=True)))
    language = next((given["language"] for given in wanted("language:response_language")), "en")
    # a prompt in English to be repeated first must not outweigh the language asked for
    filler = wanted.harmless_word() if language == "en" else f"{sample(language)} " * 20
    text = wanted.cased(_paragraphs(wanted, "\n".join(_lines(wanted, filler)), filler))
    if wanted.any("detectable_format:json_format"):
        text = json.dumps({"answer": text}, ensure_ascii=False)
    for given in wanted("combination:repeat_prompt"):
        text = f"{given['prompt_to_repeat']}\n{text}"
    for given in wanted("startend:end_checker"):
        text += f"\n{given['end_phrase']}"
    text = wanted.cased(text)
    return f'"{text}"' if wanted.any("startend:quotation") else text


@dataclass(frozen=True)
class _Wanted:
    """The instructions of an item. Called with a kind, it gives that kind's arguments, each time it occurs."""

    pairs: Sequence[tuple[str, Mapping[str, Any]]]

    def __call__(self, kind: str) -> list[Mapping[str, Any]]:
        return [given for name, given in self.pairs if name.endswith(kind)]

    def any(self, kind: str) -> bool:
        return bool(self(kind))

    def at_least(self, kind: str, number: str, relation: str = "relation") -> int:
        return max((given[number] for given in self(kind) if given[relation] == "at least"), default=0)

    def harmless_word(self) -> str:
        """A word that may be written any number of times."""
        limits = [
            (name, given)
            for name, given in self.pairs
            if "forbidden_words" in name or ("less than" in given.values() and "number_" not in name)
        ]
        return next(
            word for word in _WORDS if all(follows(name, f"{word} " * 999, given) for name, given in limits)
        )

    def cased(self, text: str) -> str:
        if self.any("change_case:english_capital"):
            return text.upper() if "THE" in text.split() else f"THE {text.upper()}"
        if self.any("change_case:english_lowercase"):
            return text.lower() if text.islower() else f"the {text.lower()}"
        return text


def _lines(wanted: _Wanted, filler: str) -> Iterator[str]:
    """What must be there, a line each."""
    word = filler.split()[0]
    for _ in wanted("detectable_format:title"):
        yield f"<<{word}>>"
    for _ in wanted("detectable_format:constrained_response"):
        yield OPTIONS[0]
    yield filler if wanted.any("language:response_language") or wanted.any("startend:quotation") else word
    for given in wanted("detectable_content:number_placeholders"):
        yield f"[{word}] " * given["num_placeholders"]
    for given in wanted("detectable_format:multiple_sections"):
        yield from (f"{given['section_spliter']} {n + 1}" for n in range(given["num_sections"]))
    for given in wanted("detectable_format:number_bullet_lists"):
        yield from [f"- {word}"] * given["num_bullets"]
    for given in wanted("detectable_format:number_highlighted_sections"):
        yield f"{word} " + f"*{word}* " * given["num_highlights"]
    for given in wanted("keywords:existence"):
        yield " ".join(given["keywords"])
    for given in wanted("keywords:frequency"):
        yield f"{given['keyword'].strip()} " * (given["relation"] == "at least") * given["frequency"]
    for given in wanted("keywords:letter_frequency"):
        yield given["letter"] * (given["let_relation"] == "at least") * given["let_frequency"]
    yield f"{word.upper()} " * wanted.at_least(
        "change_case:capital_word_frequency", "capital_frequency", "capital_relation"
    )
    for given in wanted("detectable_content:postscript"):
        yield f"{given['postscript_marker']} {word}"


def _paragraphs(wanted: _Wanted, text: str, filler: str) -> str:
    """The text as the last of as many paragraphs as wanted, in as many sentences and words."""
    before: list[str] = []
    between = "\n***\n"
    text = re.sub(r"\s*\n\s*", "\n", text.strip())
    for given in wanted("length_constraints:number_paragraphs"):
        before = [filler] * (given["num_paragraphs"] - 1)
    for given in wanted("length_constraints:nth_paragraph_first_word"):
        between, n = "\n\n", given["nth_paragraph"] - 1
        before = [filler] * (given["num_paragraphs"] - 1)
        before[n : n + 1] = [given["first_word"]] if n < len(before) else []
        text = f"{given['first_word']} {text}" if n == len(before) else text
    if wanted.any("combination:two_responses"):
        before, between = [f"{filler} {filler}"], "\n******\n"
    missing = wanted.at_least("length_constraints:number_sentences", "num_sentences")
    if missing:
        missing -= len(sentences(between.join([*before, text])))
        text = f"{text}. {f'{filler}. ' * missing}".strip()
    more = f"{filler} " * wanted.at_least("length_constraints:number_words", "num_words")
    if more and wanted.any("detectable_content:postscript"):
        text = f"{more}\n{text}"
    elif more:
        text += f" {more.strip()}"
    return between.join([*before, text])


def sample(language: str) -> str:
    """Return words by which `guess_language` recognises a language. They make no sense."""
    for words in WORDS.values():
        if language in words:
            return words[language]
    for languages in OWN_LETTERS.values():
        if language in languages:
            return " ".join(letter * 3 for letter in languages[language])
    script = next(script for script, code in SCRIPTS.items() if code == language)
    letters = (chr(code) for code in range(0x370, 0xFFFF))
    return "".join(letter for letter in letters if letter.isalpha() and script_of(letter) == script)[:12]
