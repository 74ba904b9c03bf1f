"""The choice an answer names, kind by kind, and the answers that name none."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from herd.evals.tasks.letters import chosen_letter

CITIES = ("Paris", "London", "A dog", "None of the above")
B = [
    "<answer>B</answer>", "Correct: B", "Answer - B", "My choice is B.", "The letter is B",
    "Answer: **B. London**",
    # the letter alone, however it is wrapped
    "B", "b", "(b)", "[B]", "B.", "b)", "**B**", '"B"', "`B`", "Ｂ", "（Ｂ）", " b. because",
    "B. because it is", "B: it is",
    "$\\boxed{B}$", "\\boxed{B}", "\\boxed{\\text{B}}", "$$\\boxed{\\textbf{(B)}}$$", "\\(B\\)",
    "B) London", "B.\n\nBecause A is not.",
    # stated
    "The answer is B", "The answer is B.", "The answer is: **B**", "The answer is (b).",
    "The answer is \"B\"", "answer: (b)",
    "Answer: $\\boxed{B}$", "The answer is option B", "The answer is the letter B.", "The answer is b",
    "ANSWER: B",
    "The correct option is B.", "The correct answer is B, London.", "The right choice here is clearly B",
    "Answer choice B",
    "The best answer to this question would be B.", "Final answer: B", "The answer is\nB",
    "The answer must be B!",
    "B is correct.", "(B) is the right one", "I believe that B is the best answer.", "A: The answer is B",
    # marked
    "Option B", "option B", "Choice (B)", "It is B because A is wrong", "It's B.", "I choose B.",
    "I would go with B", "I'd pick (B)",
    "The answer is a capital of France, so B.", "A capital of England is asked, therefore B",
    "I think (B) fits", "Thus, B.",
    "<b>B</b>", "Selected: B", "Of the given options, B is the most likely.", "It's definitely B.",
    "Probably B.", "Must be B", "I'd say B", "Sure! B", "Good question. B.",
    "Let me think.\n\nB", "I'm not sure, but the answer is B.",
    # other languages
    "Antwort: B", "Die richtige Antwort ist B.", "La respuesta correcta es la B", "Respuesta: B",
    "Réponse : B", "La bonne réponse est B",
    "Ответ: B", "答案是B", "答案：B", "答えはBです", "คำตอบคือ B", "Jibu ni B",
    "Lösung: B", "La risposta è B", "A resposta é B", "A resposta correta é a B.", "Resposta: B",
    "La opción B", "选B", "选择B", "正解はBです", "ข้อ B", "सही उत्तर B है", "उत्तर: B", "उत्तर है B",
    # denials and corrections
    "The answer is **A**. Actually, no, it is **B**.", "I pick A. Wait, it must be B.",
    "The answer is not A. The answer is B.", "Not A but B", "It's not A, it's B.",
    "A is wrong, B is right.", "A is incorrect. B is correct.",
    "The answer is A. Wait, no: the answer is B.", "B, not A", "B rather than A",
    "The answer isn't A; the answer is B.", "B. A is wrong.",
    "Option A is wrong. Option B", "The answer is B and not C.",
    "A is not correct; B is.", "A is not correct, but B is", "A isn't right, B is!", "A is wrong. B is.",
    "The statement A is not correct, whereas B is.", "A doesn't fit; B does.", "A does not work, B does",
    "A is not the answer. B is.", "Neither A, C nor D is right; B is.", "A is not correct;\nB is.",
    "Unlike A, B is correct.", "B, as opposed to A", "B instead of A", "Instead of A, it is B.",
    "The answer is not A or C, but B.", "The answer is not A, C, or D; it is B.", "Not A or C but B",
    "A and C are wrong, so it is B.", "A, C, and D are wrong; B is correct.", "A is ruled out, so B.",
    "A cannot be correct, so B.", "Eliminate A, C and D. B remains.", "We can rule out A and C. So B.",
    "Wrong: A, C, D. Right: B", "Correct answer: B. Incorrect: A, C, D", "A ✗, B ✓", "No doubt: it is B.",
    "I don't think it's A, so B.", "It is not true that the answer is A. The answer is B.",
    "The option that is not correct is B.", "Which one is false? The answer is B.",
    "Is it A? No. The answer is B.", "Is A correct? No, so it must be B.", "B, since A is too small",
    "Nicht A, sondern B", "Die Antwort ist nicht A, sondern B.", "La respuesta no es A, sino B.",
    "La réponse n'est pas A mais B.", "No es A, es B.", "Ответ не A, а B", "不是A，而是B。",
    # the text of the choice
    "Paris is not correct; London is.", "It is London, not Paris or a dog.", "London, rather than Paris",
    "London", "london", "London.", '"London"', "'London'", "“London”", "**London**",
    "London is the capital", "The answer is London.",
    "The answer is London, not Paris.", "It is London.", "It's \"London\" of course",
    "The capital of England is London", "Not Paris but London",
    "London (B)", "Option London", "Paris is wrong. London", "I think the city that is meant is London.",
    "Answer: London",
]  # fmt: skip
COMPARED = [
    "I prefer B to A", "I would prefer B to A.", "I'd prefer B over A", "I'd choose B over D", "I favor B over A.",
    "B over A", "B is preferable to A.", "I think B is better than A", "I'd rather choose B than A",
    "B rather than A", "rather than A, B", "Rather than A, B.", "Rather than A, I choose B", "Instead of A, B",
    "Rather than A, it should be B.",
    # one choice named in place of another
    "not A; B", "Not A. B.", "Not A, B", "Not A — B", "Not A: B", "Definitely not A. It's B", "Definitely not A. B",
    "It isn't A. B.", "Not A; B, because it is large", "A is wrong; B", "Not A, but rather B", "Not A or D; B",
    "It isn't A, C, or D; B", "Not A. Not D. B.",
    # one choice excepted from the others
    "All except B are wrong", "All but B are wrong.", "Every option but B is false", "Everything except B is incorrect",
    "All of the other options but B can be eliminated.", "All options, except B, are wrong", "Eliminate all but B.",
    "All are wrong except B", "Each choice except for B is false.", "Except for B, all are wrong.",
    "No, all except B are wrong.", "All answers apart from B are not correct", "None but B is right.",
    "No option other than B is right", "Nothing except B fits.", "None of them but B is correct.", "After eliminating all but B, I am done",
    "None of the options is right except B.", "The answer is none other than B.", "It can't be anything but B",
    "I would not choose anything but B.", "Alle außer B sind falsch", "Toutes sauf B sont fausses",
    "Todas excepto B son falsas",
]  # fmt: skip
"""Answers that name B beside other choices."""
NONE = [
    "", " ", "?", "\x00" * 100, "E", "Z.", "I don't know", "I'm not sure", "I do not know whether it is B",
    "I'm not sure. (B)",
    # letters that are words, or parts of them
    "A cat", "A capital of England", "The answer is a capital", "The answer is a city in England.",
    "It is a city", "So a city",
    "Because", "Dover", "Berlin", "Answer", "Cold", "D.C. is a city", "C++ is a language", "C# is one",
    "B-12 is a vitamin", "A's",
    "Vitamin B is healthy", "He took a vitamin. B was it", "Actually, vitamin B is healthy", "Plan B was dropped", "He got a C", "Hepatitis B", "E = mc^2", "B = 3",
    "C'est la vie", "D'accord", "A&E",
    # two choices, or none
    "A or B", "A and B", "Both A and B", "Either A or B", "The answer is A or B.", "The answer is B or A",
    "The answer is B or possibly C", "A, B", "A/B", "A & B", "(A) or (B)",
    "The answer is A and B", "Options A and B", "Neither A nor B", "Option A or option B",
    "A, B and C are right",
    "Not A", "The answer is not B", "The answer isn't B.", "B is not correct", "B is wrong",
    "B is incorrect.", "B can't be", "It cannot be B",
    "A. Paris\nB. London\nC. A dog", "London or Paris", "Paris and London", "Neither London nor Paris",
    "Not London", "London is wrong",
    "I would not choose B.", "I don't think it's B.", "I don't think that B is correct.", "Don't choose B.",
    "I cannot choose B.", "I can't say it's B.", "I doubt that B is correct.", "Eliminate B.", "I reject B.",
    "It is false that B is correct.", "It is not true that the answer is B.", "The wrong answer is B.",
    "Wrong answer: B", "Incorrect: B", "The answer is anything but B.", "All but B", "There is no way it is B",
    "The answer is far from B.", "B is hardly correct.", "B is far from correct.", "B is never right.",
    "B is partially correct", "B is unlikely.", "B ✗", "A is not correct and neither is B.",
    "A is not correct; B is not either.", "A is wrong; B is doubtful.", "If A is wrong, B is.",
    "A and B are wrong.", "Not A, B or C.", "B?", "Is it B?", "Is the answer B?", "Is B correct?",
    "All except B are right", "All but B are correct.", "Every option but B is true", "Everything except B fits",
    "None but B is wrong.", "No option except B is false", "All are right except B", "Except for B, all are right.",
    "All except B cannot be excluded", "Are all except B wrong?", "All except A and B are wrong.",
    "All except A and B are right.", "All but A or B are wrong.", "All but A, C and D are wrong", "Toutes sauf B sont correctes",
    "A is worse than B", "I wouldn't prefer B to A",
    "I don't prefer B", "I prefer not to choose B", "Not A; not B", "Not A; B or C", "Not A, B, C", "Wrong: A, B",
    "Eliminate A, B.", "I prefer A or B", "A to B",
    # both
    "A is right and B is right", "A is correct; B is too.", "A is correct, B is also correct.",
    "The answer is A, or B.", "The answer is A and the other answer is B.", "Not only A but also B",
    "Not just A but B.",
    "It is not London", "It isn't London", "Everything except London", "Londoners", "New-London",
]  # fmt: skip
OTHERS = [
    ("A dog", CITIES, "C"), ("A dog.", CITIES, "C"), ("a dog", CITIES, "C"),
    ("The answer is A dog", CITIES, "C"), ("A dog is an animal", CITIES, "C"),
    ("Dog", CITIES, "C"), ("The dog.", CITIES, "C"), ("None of the above", CITIES, "D"), ("The answer is none of the above.", CITIES, "D"),
    ("A", CITIES, "A"), ("A.", CITIES, "A"), ("A rather than B", CITIES, "A"), ("I prefer A to B", CITIES, "A"),
    ("I'd choose A over B", CITIES, "A"), ("All but A are wrong", CITIES, "A"), ("Not B; A", CITIES, "A"),
    ("I prefer London to Paris.", CITIES, "B"), ("I'd pick London over Paris", CITIES, "B"),
    ("All except London are wrong", CITIES, "B"), ("All except London are right", CITIES, None),
    ("Everything except London and Paris are right", CITIES, None), ("Not 3; 4", ("3", "4", "5"), "B"),
    ("A, because it is", CITIES, "A"), ("A is correct", CITIES, "A"),
    ("The answer is A because", CITIES, "A"), ("a)", CITIES, "A"), ("a", CITIES, "A"),
    ("The answer is a.", CITIES, "A"), ("B. Paris", CITIES, "B"), ("Antwort: C", CITIES, "C"),
    ("D", CITIES, "D"),
    ("York", ("York", "New York"), "A"), ("New York", ("York", "New York"), "B"),
    ("It is New York.", ("York", "New York"), "B"),
    ("no", ("no", "yes"), "A"), ("Yes, it is.", ("no", "yes"), "B"),
    ("The answer is no.", ("no", "yes"), "A"),
    ("There is no way to know", ("no", "yes"), None), ("I know that", ("no", "yes"), None),
    ("Yes. There is no doubt", ("no", "yes"), "B"),
    ("4", ("3", "4", "5"), "B"), ("The answer is 4.", ("3", "4", "5"), "B"),
    ("4 apples", ("3", "4", "5"), "B"), ("4.5", ("3", "4", "5"), None),
    ("40", ("3", "4", "5"), None), ("3 + 1 = 4", ("3", "4", "5"), "B"), ("-4", ("-4", "4"), "A"),
    ("3 or 4", ("3", "4", "5"), None),
    ("1/2", ("1", "1/2"), "B"), ("$\\frac{1}{2}$", ("1", "\\frac{1}{2}"), "B"), ("x", ("x", "y"), None),
    ("C", ("A", "B", "C", "D"), "C"),
    ("B", ("D", "C", "A"), "B"), ("Vitamin C", ("Vitamin C", "Vitamin D", "x", "z"), "A"),
    ("The answer is Vitamin C", ("x", "Vitamin C", "z", "w"), "B"),
    ("same", ("same", "same"), None), ("A red one", ("red", "blue", "green"), None),
    ("green", ("red", "blue", "green"), "C"),
    ("It is I", tuple("rstuvwxyz"), "I"), ("I think so", tuple("rstuvwxyz"), None),
    ("東京です", ("大阪", "東京"), "B"), ("東京", ("大阪", "東京"), "B"),
]  # fmt: skip

MENDED = [
    ("A. Not B.", CITIES, "A"), ("The answer is A. Not C, D.", CITIES, "A"), ("Answer: A. Eliminate B.", CITIES, "A"),
    ("A, but wait, B.", CITIES, "B"), ("I pick A. Wait, B.", CITIES, "B"), ("The letter seems B.", CITIES, "B"),
    ("I think A must be correct.", CITIES, "A"), ("A might be false, so B", CITIES, "B"), ("A、B", CITIES, None),
    ("A is most likely wrong, B is.", CITIES, "B"), ("No, all but B are wrong.", CITIES, "B"),
    ("Not none of the above, B", CITIES, "B"), ("London is correct\nA dog", CITIES, "B"),
    ("Answer: option B. Some say it is A", CITIES, "B"), ("The right one among A, B and C is B", CITIES, "B"),
    ("La respuesta no es Paris. B", CITIES, "B"), ("A/B, B is true", CITIES, "B"),
    ("Die Straße ist es, nicht der Weg", ("Straße", "Weg"), "A"), ("*", ("+", "*"), "B"), ("", ("+", "*"), None),
]  # fmt: skip
TWO = ("cat", "dog")
OF_TWO = [
    ("All except B are right", TWO, "A"), ("All but A are correct.", TWO, "B"), ("Everything except B fits", TWO, "A"),
    ("None but A is wrong.", TWO, "B"), ("No option except B is false", TWO, "A"), ("Except for B, all are right", TWO, "A"),
    ("The answer is anything but B.", TWO, "A"), ("All except the dog are right", TWO, "A"),
    ("Toutes sauf B sont correctes", TWO, "A"), ("Alle außer A sind richtig", TWO, "B"),
    ("All except B are wrong", TWO, "B"), ("Are all except B right?", TWO, None), ("All except A and B are right", TWO, None),
    ("A is not correct; B is.", TWO, "B"), ("All but A and B are right", (*TWO, "cow"), "C"),
    ("All but A and B are wrong", (*TWO, "cow"), None), ("All but A are right", (*TWO, "cow"), None),
]  # fmt: skip
"""Where all choices but one are excepted from the right ones, that one is meant."""


def letter(text, choices=CITIES):
    return chosen_letter(text, "ABCDEFGHIJ"[: len(choices)], choices)


@pytest.mark.parametrize("text", B)
def test_an_answer_that_names_b_is_read_as_b(text):
    assert letter(text) == "B"


@pytest.mark.parametrize("wrapped", ["{}", '"{}"', "'{}'", "**{}**", "({})", "option {}", "“{}”"])
@pytest.mark.parametrize("text", COMPARED)
def test_a_choice_named_beside_others_is_read_however_they_are_wrapped(text, wrapped):
    assert letter(re.sub(r"\b[ABD]\b", lambda match: wrapped.format(match[0]), text)) == "B"


@pytest.mark.parametrize("text", NONE)
def test_no_letter_is_made_of_an_answer_that_names_none(text):
    assert letter(text) is None


@pytest.mark.parametrize(("text", "choices", "expected"), OTHERS + MENDED + OF_TWO)
def test_each_answer_names_the_expected_choice(text, choices, expected):
    assert letter(text, choices) == expected


@given(st.text() | st.text("ABab .,()not is or answer"))
def test_any_text_gives_a_letter_or_none(text):
    assert chosen_letter(text, "AB", ["yes", "no"]) in ("A", "B", None)
