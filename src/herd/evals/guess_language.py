"""Which language a text is in, guessed from its letters and its commonest words; small, fixed, and good for sentences.

The script settles most cases. Languages that share a script are told apart by letters that only one of them has, then
by function words. Enough to see whether an answer came in the language that was asked for (IFEval); not meant for
single words or for mixtures, of which it names the larger part.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter

_SCRIPTS = {
    "BENGALI": "bn", "GUJARATI": "gu", "GURMUKHI": "pa", "HANGUL": "ko", "KANNADA": "kn", "MALAYALAM": "ml",
    "TAMIL": "ta", "TELUGU": "te", "THAI": "th", "HEBREW": "he", "GREEK": "el", "HIRAGANA": "ja", "KATAKANA": "ja",
    "CJK": "zh",
}  # fmt: skip
"""First words of Unicode character names to the language written in them alone."""

_OWN_LETTERS = {
    "ARABIC": (("ur", "ٹڈڑںےہ"), ("fa", "پچژگکی"), ("ar", "ةىيك")),
    "CYRILLIC": (("uk", "іїєґ"), ("ru", "ыэё"), ("bg", "ъ")),
}
"""Letters that tell apart languages of one script, the surest first; Urdu has Persian's letters as well."""

WORDS = {
    "DEVANAGARI": {
        "hi": "है हैं और में नहीं यह था के लिए पर हो रहा कर सकते एक इस",
        "mr": "आहे आणि मध्ये नाही हे होते च्या साठी आहेत ते केले तर मी एक या",
        "ne": "छ र मा छन् यो थियो को लागि हुन्छ पनि भएको गर्न हो एक यस",
    },
    "LATIN": {
        "en": "the and of to in is that for it with as are this be was on you not have by",
        "de": "der die und das ist nicht ein eine zu den mit von für auf sich auch dem wird ich sind",
        "fr": "le la les et des est une un l d au que pour dans pas du qui vous sur ce il avec ne",
        "es": "el la los y de que en una un es por con para se las del no más como su",
        "it": "il che di e la per un una non è con del sono della gli anche si le nel più",
        "pt": "o que de e a do da em um para é com não uma os se na mais as dos",
        "nl": "de het een en van is dat niet te op met voor zijn die aan er ook wij",
        "fi": "ja on ei se että hän oli mutta ovat joka tämä kun myös niin kuin voi mitä olla",
        "sw": "na ya kwa ni wa katika za hii la kuwa cha watu yake lakini sana kama hiyo yao",
        "vi": "và của là có không một cho được trong những người với các này đã để khi",
        "pl": "i w nie na się jest że z do to jak ale jego przez dla są oraz jest",
        "id": "dan yang di untuk dengan tidak ini dari dalam adalah itu pada akan ke",
        "tr": "ve bir bu için ile de çok olarak daha gibi ama kadar sonra ne",
    },
}  # fmt: skip
"""Function words, by script."""

_WORD = re.compile(r"[^\W\d_]+(?:[\u0300-\u036f\u0900-\u0903\u093a-\u094f]+[^\W\d_]*)*")


def guess_language(text: str) -> str:
    """ISO 639-1 code of the likeliest language, "" where there is no letter."""
    scripts = Counter(_script(letter) for letter in text if letter.isalpha())
    if not scripts:
        return ""
    if scripts["HIRAGANA"] + scripts["KATAKANA"] > 0.1 * scripts.total():
        return "ja"  # Chinese characters are most of some Japanese texts
    script = scripts.most_common(1)[0][0]
    if script in _OWN_LETTERS:
        return _by_letters(text, script)
    return _by_words(text, WORDS[script]) if script in WORDS else _SCRIPTS.get(script, "")


def sample(language: str) -> str:
    """Words of a language that `guess_language` knows it by; no sense is meant."""
    for words in WORDS.values():
        if language in words:
            return words[language]
    for languages in _OWN_LETTERS.values():
        for code, letters in languages:
            if code == language:
                return " ".join(letter * 3 for letter in letters)
    script = next(script for script, code in _SCRIPTS.items() if code == language)
    return "".join(chr(c) for c in range(0x370, 0xFFFF) if chr(c).isalpha() and _script(chr(c)) == script)[
        :12
    ]


def _by_letters(text: str, script: str) -> str:
    letters = _OWN_LETTERS[script]
    counts = Counter(text.lower())
    best = max(letters, key=lambda pair: sum(counts[letter] for letter in pair[1]))
    first, own = letters[0]  # its letters occur in no other language of the script
    return first if sum(counts[letter] for letter in own) * 20 > counts.total() ** 0.5 else best[0]


def _by_words(text: str, languages: dict[str, str]) -> str:
    words = Counter(_WORD.findall(unicodedata.normalize("NFC", text.lower())))
    hits = {code: sum(words[word] for word in listed.split()) for code, listed in languages.items()}
    return max(hits, key=hits.__getitem__)


def _script(letter: str) -> str:
    return unicodedata.name(letter, "").split(" ", 1)[0] if letter > "\x7f" else "LATIN"
