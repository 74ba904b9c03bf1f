"""The number an answer ends on, kind by kind, in the languages of MGSM."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from herd.evals.tasks.numbers import final_number

IS_29 = [
    # the endings that published prompts ask for, and the marks of GSM8K
    "The final answer is \\boxed{29}.",
    "The final answer is $\\boxed{29}$.",
    "Therefore, the final answer is: $\\boxed{29}$. I hope it is correct.",
    "The final answer is **$\\boxed{29}$**. I hope it is correct.",
    "The final answer is: \\(29\\)",
    "The final answer is \\[29\\]",
    "The final answer is $\\$29$.",
    "The final answer is \\boxed{\\$29}",
    "The final answer is \\boxed{\\text{29 dollars}}",
    "So we get $$\\boxed{29}$$ eggs out of 40.",
    "The final answer is 29. I hope it is correct.",
    "3 * 9 + 2 = 29\n#### 29",
    "#### Step 1\nAdd 3.\n#### Step 2\n3 + 26 = 29",
    "**Final Answer:** 29",
    "### Final answer\n\n29",
    "Final answer: $29.00",
    "FINAL ANSWER: 29 apples",
    "The answer is 29. She had 40 before.",
    "The answer is:\n\n29",
    "The answer to the question is 29, of 40.",
    "The final answer is __29__.",
    "The final answer is `29`.",
    # currencies, units, signs
    "The final answer is ＄２９",
    "The final answer is US$29",
    "The final answer is USD 29",
    "The final answer is 29 €",
    "The final answer is €29",
    "The final answer is £29.",
    "The final answer is Rs. 29",
    "The final answer is 29%",
    "The final answer is 29km",
    "The final answer is +29",
    "The final answer is 29.0",
    "The final answer is 029",
    # calculations, fractions, more than one statement
    "The final answer is 58 / 2 = 29",
    "The final answer is 58/2",
    "The final answer is $\\frac{58}{2}$",
    "The final answer is 20 + 9 = 29 dollars.",
    "The final answer is x = 29",
    "The final answer is 30. Wait, that forgets one.\nThe final answer is 29.",
    "The answer is 29. To check the answer: 29 + 1 = 30.\nThe final answer is 29",
    "The final answer is 29 dollars for 3 people",
    "The final answer is 29 (of 40)",
    "The final answer is 29, not 30.",
    "The answer is not 30. The answer is 29.",
    # digits of other scripts
    "The final answer is ２９",
    "The final answer is २९",
    "The final answer is ২৯",
    "The final answer is ౨౯",
    "The final answer is ๒๙",
    "The final answer is ٢٩",
    # no statement: the last number
    "29",
    "She has 40 and gives 11 away, so 29 remain.",
    "It is 29, not 30.",
    "5 and 24 make 29",
    "40 - 11 = 29",
    "Total: 29.",
]
NOT_29 = [
    "",
    "I don't know.",
    "I don't know, there are 29 in the question.",
    "It cannot be determined from 29.",
    "The final answer is not 29.",
    "The final answer isn't 29",
    "The final answer is 28 or 29",
    "The final answer is 29 or 30.",
    "The final answer is either 29 or 30",
    "The final answer is 28-29",
    "The final answer is 29–30",
    "The final answer is 29 to 30",
    "The final answer is between 20 and 29",
    "The final answer is 29 and 30",
    "The final answer is 29, 30",
    "The final answer is 29 dollars or 30 dollars",
    "The final answer is 29 dollars and 50 cents",
    "The final answer is −29",
    "The final answer is -$29",
    "The final answer is $-29",
    "The final answer is – 29",
    "The final answer is 2.9",
    "The final answer is 29.5",
    "The final answer is 29,5",
    "The final answer is 29½",
    "The final answer is 29 1/2",
    "The final answer is 29/30",
    "The final answer is \\frac{29}{30}",
    "The final answer is 29^2",
    "The final answer is 29²",
    "The final answer is 29 * 2",
    "The final answer is 29:30",
    "The final answer is 290",
    "The final answer is 129",
    "The final answer is 29,000",
    "The final answer is 29 000",
    "The final answer is 29e2",
    "The final answer is 29 \\times 10^2",
    "The final answer is \\boxed{29\\cdot10^2}",
    "The final answer is minus 29",
    "The final answer is negative 29",
    "The final answer is 29 million",
    "The final answer is 29 thousand dollars",
    "The final answer is 29/0",
    "The final answer is 30. 29 would be too few.",
    "The final answer is \\boxed{30}, since 29 are gone.",
    "29 eggs are left. The final answer is 30.",
    "See table A29",
    "At 8:29",
    "28 to 29",
    "28 or 29",
    "28–29",
    "somewhere between 28 and 29",
    "2" * 5000,
]
BY_LANGUAGE = [
    ("en", "The final answer is 1,234", 1234),
    ("en", "The final answer is 1 234", 1234),
    ("en", "The final answer is 1\u202f234", 1234),
    ("en", "The final answer is 1{,}234", 1234),
    ("en", "The final answer is 1\\,234", 1234),
    ("en", "The final answer is 1'234", 1234),
    ("en", "The final answer is 1_234", 1234),
    ("en", "The final answer is 1，234", 1234),
    ("en", "The final answer is 1,234,567.50", Fraction("1234567.5")),
    ("en", "The final answer is 12,34,567", 1234567),
    ("en", "The final answer is 1.234", Fraction("1.234")),
    ("en", "The final answer is 0,500", Fraction("0.5")),
    ("en", "The final answer is .5", Fraction("0.5")),
    ("en", "The final answer is 1/2", Fraction("0.5")),
    ("en", "The final answer is 1½", Fraction("1.5")),
    ("en", "The final answer is 1,2,3", None),
    ("en", "The final answer is 1.2.3", None),
    ("en", "The final answer is −5", -5),
    ("en", "The final answer is \\boxed{-5}", -5),
    ("en", "The final answer is:\n- 5", 5),
    ("en", "The final answer is minus 5 degrees", -5),
    ("en", "The final answer is 10 minus 5 = 5", 5),
    ("en", "The final answer is 1.5 million people", 1500000),
    ("en", "The final answer is 2 dozen", 24),
    ("en", "The final answer is 12 thousandths", 12),
    ("en", "He has 2 thousand in all", 2000),
    ("de", "Die Antwort ist minus 5", -5),
    ("fr", "La réponse est moins 5", -5),
    ("de", "Die endgültige Antwort ist 1.234.", 1234),
    ("de", "Die Antwort ist 1.234.567", 1234567),
    ("de", "Die Antwort lautet: 1.234,50 Euro", Fraction("1234.5")),
    ("de", "Antwort: **2,5**", Fraction("2.5")),
    ("de", "Die Antwort ist 2.5", Fraction("2.5")),
    ("de", "Die Antwort ist 1,234", Fraction("1.234")),
    ("de", "Die Antwort ist 1 234 Euro", 1234),
    ("de", "Die Antwort ist 5 bis 6", None),
    ("de", "Die Antwort ist nicht 5", None),
    ("de", "The final answer is 1,234", 1234),
    ("de", "The final answer is 1.234", 1234),
    ("de", "Sie nimmt 1.234 Euro ein.", 1234),
    ("es", "La respuesta final es 1.234", 1234),
    ("es", "La respuesta es 2,5.", Fraction("2.5")),
    ("es", "Respuesta: 12 345 dólares", 12345),
    ("es", "La respuesta es 5 o 6", None),
    ("fr", "La réponse finale est 1 234 euros", 1234),
    ("fr", "La réponse est 1\u00a0234,5", Fraction("1234.5")),
    ("fr", "Réponse : 29 €", 29),
    ("fr", "Il reste 1 234 euros.", 1234),
    ("fr", "La réponse est 5 ou 6", None),
    ("ru", "Ответ: 1 234", 1234),
    ("ru", "Окончательный ответ — 29 рублей из 40", 29),
    ("ru", "Ответ: 5 или 6", None),
    ("ja", "答えは２９です。", 29),
    ("ja", "答え：１，２３４円です。", 1234),
    ("ja", "したがって、彼女は29個持っています。", 29),
    ("zh", "答案是29。还剩30个", 29),
    ("zh", "最终答案：1,234元", 1234),
    ("th", "คำตอบคือ ๒๙", 29),
    ("th", "คำตอบคือ 29 จาก 40", 29),
    ("th", "คำตอบสุดท้ายคือ ๑,๒๓๔ ดอลลาร์", 1234),
    ("bn", "উত্তর: ২৯", 29),
    ("bn", "মোট ১,২৩,৪৫৬ টাকা", 123456),
    ("te", "సమాధానం ౨౯", 29),
    ("sw", "Jibu ni 1,234", 1234),
]


@pytest.mark.parametrize("answer", IS_29)
def test_a_number_is_read_however_it_is_written(answer):
    assert final_number(answer) == 29


@pytest.mark.parametrize("answer", NOT_29)
def test_an_answer_that_does_not_commit_to_29_is_not_read_as_29(answer):
    assert final_number(answer) != 29


@pytest.mark.parametrize(("language", "answer", "number"), BY_LANGUAGE)
def test_points_and_commas_mean_what_the_language_says(language, answer, number):
    assert final_number(answer, language) == number


@given(st.integers(-(10**9), 10**9), st.sampled_from(["de", "en", "fr"]))
def test_every_grouped_integer_is_read(number, language):
    grouped = f"{number:,}".replace(",", {"de": ".", "en": ",", "fr": "\u202f"}[language])
    assert final_number(f"x = {grouped}.", language) == number


@given(st.text() | st.text("0123456789.,-/ =$\\{}boxed"))
def test_any_text_gives_a_number_or_none(text):
    number = final_number(f"The answer is {text}")
    assert number is None or isinstance(number, Fraction)
