"""IFEval's checkers: real items have answers they accept, every rule can fail, and loose forgives what it says."""

import json

import pytest
from gold import gold_answer
from hypothesis import given
from hypothesis import strategies as st
from ifeval_answers import sample, satisfying

from herd.errors import DataError
from herd.evals.guess_language import WORDS, guess_language
from herd.evals.ifeval import (
    CHECKS,
    capital_words,
    contradictions,
    follows,
    forgiven,
    loose,
    sentences,
    strict,
)
from herd.evals.tasks.data import Data
from herd.evals.tasks.instructions import IfEval
from herd.evals.tasks.task import Answer

CONTRADICTORY = {
    1627: ["en:punctuation:no_comma"],
    3369: ["en:keywords:frequency"],
    3371: ["en:keywords:forbidden_words"],
    374: ["en:keywords:forbidden_words"],
    3718: ["en:punctuation:no_comma"],
}
"""Real items whose prompt, which is to be repeated, breaks another of their instructions."""

CASES = [
    ("change_case:capital_word_frequency", {"capital_frequency": 2, "capital_relation": "at least"}, "GO NO", "Go NO"),
    ("change_case:capital_word_frequency", {"capital_frequency": 2, "capital_relation": "less than"}, "GO now", "A B"),
    ("change_case:english_capital", {}, "THE END OF THE DAY.", "The end of the day."),
    ("change_case:english_capital", {}, "IT IS ON!", "DAS IST NICHT MIT DER BAHN"),
    ("change_case:english_lowercase", {}, "the end of the day.", "The end of the day."),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say it. "}, "say it. It.", "It. Say it."),
    ("combination:two_responses", {}, "yes\n******\nno", "yes ****** yes"),
    ("combination:two_responses", {}, "******yes******no", "a ****** b ****** c"),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[a] or [b]", "[a] or b"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Bye\np. s. hello", "Bye, PS hello"),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "Bye\nP.P.S. hello", "Bye\nP.S. hello"),
    ("detectable_format:constrained_response", {}, "Well. My answer is no.", "My answer is possibly."),
    ("detectable_format:json_format", {}, '```json\n{"a": [1]}\n```', '{"a": [1}'),
    ("detectable_format:multiple_sections", {"section_spliter": "Day", "num_sections": 2}, "Day 1 a\nDay 2", "Day one"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n- b", "* a\n* b\n* c"),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a* and *b*", "*a* and * *"),
    ("detectable_format:title", {}, "<<Joy>>\ntext", "<< >>\ntext"),
    ("keywords:existence", {"keywords": ["tea", "cup"]}, "A Cup of teas", "A cup"),
    ("keywords:forbidden_words", {"forbidden_words": ["tea"]}, "steam and teas", "Tea!"),
    ("keywords:frequency", {"keyword": "tea", "frequency": 2, "relation": "at least"}, "tea tea", "tea"),
    ("keywords:letter_frequency", {"letter": "T", "let_frequency": 2, "let_relation": "less than"}, "at", "Tt"),
    ("language:response_language", {"language": "hi"}, "यह एक किताब है", "This is the book"),
    ("length_constraints:nth_paragraph_first_word",
     {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "weeks"}, "A.\n\n'Weeks' went", "A.\n\nB\n\nWeeks"),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "a\n***\nb", "a\n***\n\n***\nb"),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "at least"}, "Go! Now.", "Dr. No is in."),
    ("length_constraints:number_words", {"num_words": 3, "relation": "less than"}, "two words", "not two words"),
    ("punctuation:no_comma", {}, "a; b", "a, b"),
    ("startend:end_checker", {"end_phrase": "That is all."}, "Yes. that is all. ", "That is all. Bye"),
    ("startend:quotation", {}, '"all of it"', '"a" said b'),
]  # fmt: skip


@pytest.mark.parametrize("kind, kwargs, good, bad", CASES)
def test_each_kind_accepts_and_refuses(kind, kwargs, good, bad):
    assert follows(kind, good, kwargs)
    assert not follows(kind, bad, kwargs)
    assert not follows(f"en:{kind}", " \n", kwargs)


def test_every_kind_has_a_case():
    assert {case[0] for case in CASES} == set(CHECKS)
    assert len(CHECKS) == 25


def test_real_items_have_answers_that_follow_them(real_data):
    path = real_data("ifeval") / "en_input_data.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert {name.removeprefix("en:") for row in rows for name in row["instruction_id_list"]} <= set(CHECKS)
    impossible = {}
    for row in rows:
        names, kwargs = row["instruction_id_list"], row["kwargs"]
        broken = contradictions(names, kwargs)
        if broken:
            impossible[row["key"]] = broken
        assert all(strict(names, satisfying(names, kwargs), kwargs)) == (not broken)
        assert not any(loose(names, "", kwargs))
    assert len(rows) == 541
    assert impossible == CONTRADICTORY


REPEAT = ("combination:repeat_prompt", {"prompt_to_repeat": "Be right, farmer Joe."})
BROKEN_FOR_GOOD = [
    ("punctuation:no_comma", {}),
    ("keywords:forbidden_words", {"forbidden_words": ["tea", "FARMER"]}),
    ("keywords:frequency", {"keyword": "right", "frequency": 1, "relation": "less than"}),
    ("keywords:letter_frequency", {"letter": "r", "let_frequency": 3, "let_relation": "less than"}),
]
KEPT_OR_MENDED = [
    ("keywords:forbidden_words", {"forbidden_words": ["tea", "jo", "farm"]}),
    ("keywords:frequency", {"keyword": "right", "frequency": 2, "relation": "less than"}),
    ("keywords:frequency", {"keyword": "tea", "frequency": 2, "relation": "at least"}),
    ("length_constraints:number_words", {"num_words": 9, "relation": "at least"}),
]


@given(st.text(max_size=40), st.sampled_from(["", " ", ", ", ". ", "\n"]), st.sampled_from(BROKEN_FOR_GOOD))
def test_no_answer_follows_what_the_repeated_prompt_breaks(more, between, rule):
    (kind, kwargs), (repeat, prompt) = rule, REPEAT
    assert contradictions([repeat, kind], [prompt, kwargs]) == [kind]
    for beginning in (prompt["prompt_to_repeat"], prompt["prompt_to_repeat"].upper()):
        assert strict([repeat, kind], beginning + between + more, [prompt, kwargs]) == [True, False]


@pytest.mark.parametrize("kind, kwargs", KEPT_OR_MENDED)
def test_what_can_still_be_followed_is_no_contradiction(kind, kwargs):
    assert contradictions([REPEAT[0], kind], [REPEAT[1], kwargs]) == []
    assert contradictions([kind], [kwargs]) == []


def test_task_scores_prompts_and_instructions(real_data):
    task = IfEval("ifeval", 0, "instruct")
    items = [item for item in task.items(Data(real_data("ifeval").parent)) if len(item.gold) == 2][:10]
    judged = [task.judge(item, gold_answer(task, item, n % 2 == 0)) for n, item in enumerate(items)]
    assert [judgement.value for judgement in judged] == [1, 0] * 5
    half = task.judge(items[0], Answer("so"))
    assert half.why.startswith("not followed: ")


@given(st.text(alphabet='ab*, \n"<>[].A', max_size=60), st.sampled_from(CASES))
def test_loose_accepts_whatever_strict_does(text, case):
    kind, kwargs, *_ = case
    assert strict([kind], text, [kwargs])[0] <= loose([kind], text, [kwargs])[0]


def test_loose_forgives_first_and_last_line_and_asterisks():
    forms = forgiven("Sure!\n*yes*\nBye")
    assert {"Sure!\n*yes*\nBye", "yes", "*yes*", "Sure!\nyes", "yes\nBye"} <= set(forms)
    kwargs = [{}]
    assert strict(["startend:quotation"], 'Sure:\n"x"', kwargs) == [False]
    assert loose(["startend:quotation"], 'Sure:\n"x"', kwargs) == [True]


def test_unknown_instruction_is_named():
    with pytest.raises(DataError, match="colour:blue"):
        follows("colour:blue", "text", {})


def test_sentences_and_capital_words():
    assert sentences('Mr. Fox left. "Why?" asked J. Doe e.g. me!\n1. one') == [
        "Mr. Fox left.", '"Why?"', "asked J. Doe e.g. me!", "1. one"]  # fmt: skip
    assert capital_words("NASA's U.S. I-5 and Me") == ["NASA", "U.S", "I-5"]


def test_languages_are_told_apart(real_data):
    folder = real_data("ud_pud_parallel")
    for language in ("en", "de", "fr", "it", "pt", "hi", "es", "th", "ja", "zh"):
        lines = (folder / f"{language}.txt").read_text(encoding="utf-8").splitlines()
        paragraphs = [" ".join(lines[i : i + 5]) for i in range(0, 500, 5)]
        assert sum(guess_language(text) == language for text in paragraphs) >= 98, language


OTHERS = "ar fa ur ru bg uk bn gu pa ko kn ml ta te th ja zh".split()


@pytest.mark.parametrize("language", [*(code for group in WORDS.values() for code in group), *OTHERS])
def test_sample_is_of_its_language(language):
    assert guess_language(sample(language)) == language


def test_no_letters_no_language():
    assert guess_language("123 + 4!") == ""
