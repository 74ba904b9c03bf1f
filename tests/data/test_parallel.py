"""The sentences of the built-in corpus say the same, line by line, in nine languages."""

import unicodedata
from importlib.resources import files

import pytest

LANGUAGES = ("en", "de", "fr", "it", "pt", "hi", "es", "th", "ja")
SCRIPTS = {"hi": ("DEVANAGARI",), "th": ("THAI",), "ja": ("HIRAGANA", "KATAKANA", "CJK")}


def lines(lang: str) -> list[str]:
    text = (files("herd.data") / "parallel" / f"{lang}.txt").read_text(encoding="utf-8")
    assert text.endswith("\n")
    return text[:-1].split("\n")


def script(character: str) -> str:
    return unicodedata.name(character, "?").split()[0]


@pytest.mark.parametrize("lang", LANGUAGES)
def test_every_line_is_unique_and_in_its_own_script(lang):
    sentences = lines(lang)
    assert len(sentences) == len(lines("en")) >= 250
    assert len(set(sentences)) == len(sentences)
    expected = SCRIPTS.get(lang, ("LATIN",))
    for sentence in sentences:
        assert sentence == unicodedata.normalize("NFC", sentence.strip())
        assert "  " not in sentence
        letters = [c for c in sentence if unicodedata.category(c)[0] in "LM"]
        assert letters
        assert all(script(c) in (*expected, "COMBINING") or c in "々ー" for c in letters), sentence
        assert not any(unicodedata.category(c) in ("Cc", "Cf", "Co", "Cn") for c in sentence), sentence


def test_lines_are_aligned_and_no_language_copies_another():
    """Translations have about the length their language usually takes, and differ from each other."""
    columns = {lang: lines(lang) for lang in LANGUAGES}
    for sentences in columns.values():
        usual = sum(map(len, sentences)) / sum(map(len, columns["en"]))
        for english, sentence in zip(columns["en"], sentences, strict=True):
            assert 0.4 * usual < (len(sentence) + 8) / (len(english) + 8) < 2.2 * usual, (english, sentence)
    for row in zip(*columns.values(), strict=True):
        assert len(set(row)) == len(LANGUAGES), row


def test_questions_are_questions_in_every_european_language():
    columns = {lang: lines(lang) for lang in ("en", "de", "fr", "it", "pt", "es")}
    for row in zip(*columns.values(), strict=True):
        assert len({"?" in sentence for sentence in row}) == 1, row
