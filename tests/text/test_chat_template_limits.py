"""Hostile and broken chat templates: they end quickly, take little memory, and are refused in one line."""

import random
import resource
import time

import pytest

from herd.errors import ChatError
from herd.text import chat_template
from herd.text.chat_template import ChatTemplate

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 6 times 7?"},
    {"role": "assistant", "content": "42"},
    {"role": "user", "content": "And 6 times 8?"},
]
BOMBS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "mul": "{{ 'x' * 10**10 }}",
    "mul2": "{{ messages * 10**9 }}",
    "dbl": "{% set ns = namespace(x='aaaa') %}{% for i in range(99) %}"
    "{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
    "dbl+": "{% set ns = namespace(x='aaaa') %}{% for i in range(99) %}"
    "{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
    "dblint": "{% set ns = namespace(x=3) %}{% for i in range(99) %}"
    "{% set ns.x = ns.x * ns.x %}{% endfor %}{{ ns.x }}",
    "listdag": "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}"
    "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "listjson": "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}"
    "{% endfor %}{{ ns.x|tojson }}",
    "listeq": "{% set ns = namespace(x=[1],y=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}"
    "{% set ns.y = [ns.y, ns.y] %}{% endfor %}{{ ns.x == ns.y }}",
    "macro": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "rec": "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(60) }}",
    "center": "{{ 'a'|center(10**9) }}",
    "ljust": "{{ 'a'.ljust(10**9) }}",
    "fmt": "{{ '%1000000000d' % 1 }}",
    "fmt2": "{{ '{:>1000000000}'.format(1) }}",
    "fmt3": "{{ '%*d'|format(10**9, 1) }}",
    "replace": "{{ ('a'*1000000)|replace('a', 'b'*1000000) }}",
    "replace2": "{{ ('a'*1000000).replace('a', 'b'*1000000) }}",
    "join": "{{ (['a']*100000)|join('b'*1000000) }}",
    "join2": "{{ ('b'*1000000).join(['a']*100000) }}",
    "indent": "{{ ('a\n'*1000000)|indent(9999) }}",
    "batch": "{{ [1]|batch(10**9, 'x')|list }}",
    "lipsum": "{{ lipsum(n=99999) }}",
    "blockset": "{% set ns = namespace(x='aaaa') %}{% for i in range(99) %}{% set y %}{{ ns.x }"
    "}{{ ns.x }}{% endset %}{% set ns.x = y %}{% endfor %}{{ ns.x }}",
    "macrodbl": "{% macro d(x) %}{{ x }}{{ x }}{% endmacro %}{% set ns = namespace(x='aaaa') %}"
    "{% for i in range(99) %}{% set ns.x = d(ns.x) %}{% endfor %}{{ ns.x|length }}",
    "sumlist": "{{ ([['a'*100000]]*1000)|sum(start=[])|length }}",
    "mapjoin": "{{ range(99999)|map('string')|map('center', 9000)|join|length }}",
    "incl": "{% include 'x' %}",
    "repeatlist": "{% set x = [1]*1000000 %}{% for i in range(9999) %}{% set y = x + x %}{% endfor %}",
    "slices": "{% for i in range(99999) %}{{ ('a'*10000000)[1:] }}{% endfor %}",
    "deep parentheses": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "deep ifs": "{% if 1 %}" * 500 + "{% endif %}" * 500,
    "deep loops": "{% for a in [1] %}" * 100 + "{% endfor %}" * 100,
    "a very long number": "{{ " + "9" * 5000 + " }}",
    "copies of slices": "{% set x = 'a' * 10000000 %}{% for i in range(99999) %}"
    "{% set y = x[::-1] %}{% endfor %}",
    "split again and again": "{% set x = 'a b' * 3000000 %}{% for i in range(9999) %}"
    "{% set y = x.split(' ') %}{% endfor %}",
    "not closed": "{% for m in messages %}{{ m.content }}",
    "no template at all": "x" * 1_000_001,
}


@pytest.fixture(autouse=True)
def short_time(monkeypatch):
    monkeypatch.setattr(chat_template, "MAX_SECONDS", 0.3)


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_in_one_line(name):
    used, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.thread_time()
    with pytest.raises(ChatError, match="the chat template") as caught:
        ChatTemplate(BOMBS[name], {}).render(MESSAGES)
    assert "\n" not in str(caught.value)
    assert time.thread_time() - began < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used < 800_000  # kB


@pytest.mark.parametrize(
    "text, expected",
    [
        ("{{ '**%s**' % messages[1].content }}", "**What is 6 times 7?**"),
        ("{{ '{} {}'.format(1, 'a') }}", "1 a"),
        ("{{ messages | map(attribute='role') | join(', ') }}", "system, user, assistant, user"),
        ("{{ messages[0] | tojson }}", '{"role": "system", "content": "Be brief."}'),
        ("{{ messages[0] | tojson(indent=2) }}", '{\n  "role": "system",\n  "content": "Be brief."\n}'),
        ("{{ 'a' ~ 1 ~ none ~ 2.5 }}", "a1None2.5"),
        ("{{ (messages[1:] + messages)[0].role ~ ('x' * 3) ~ 2 ** 10 }}", "userxxx1024"),
        ("{% for m in messages %}{{ loop.index if m.role == 'user' and not loop.last }}{% endfor %}", "2"),
        ("{{ 'a-b'.split('-')[-1].upper() | replace('B', 'c') | indent(2) }}", "c"),
        ("{{ 7 % 4 + 7 // 2 }}", "6"),
    ],
)
def test_what_templates_do_works_within_the_limits(text, expected):
    assert ChatTemplate(text, {}).render(MESSAGES) == expected


def test_a_long_dialog_is_within_the_limits(template_texts):
    said = []
    long = [{"role": ("user", "assistant")[n % 2], "content": "word " * 2000} for n in range(401)]
    for text in template_texts:
        try:
            ChatTemplate(text, {"bos_token": "<s>", "eos_token": "</s>"}).render(long)
        except ChatError as error:
            said.append(str(error))
    assert [reason for reason in said if "more than" in reason] == []


@pytest.fixture
def template_texts(real_data) -> list[str]:
    return [
        path.read_text(encoding="utf-8") for path in (real_data("llamacpp_vectors") / "templates").iterdir()
    ]


def fuzz(texts: list[str], n: int, seed: int) -> None:
    """Render mutated templates. Every outcome is a text or a ChatError of one line."""
    rng = random.Random(seed)
    pieces = [
        "{%", "%}", "{{", "}}", " * 9999999", "~", "|", "loop", "messages", "range(99999)", "(", ")", "'",
        " + ",
    ]  # fmt: skip
    said = []
    for _ in range(n):
        text = rng.choice(texts)
        for _ in range(rng.randrange(1, 6)):
            at, length = rng.randrange(len(text)), rng.randrange(1, 40)
            kind = rng.randrange(4)
            if kind == 0:
                text = text[:at] + text[at + length :]
            elif kind == 1:
                text = text[:at] + rng.choice(pieces) + text[at:]
            elif kind == 2:
                other = rng.choice(texts)
                text = text[:at] + other[at : at + 10 * length] + text[at:]
            else:
                text = text[:at] + text[at : at + length] * rng.randrange(2, 4) + text[at + length :]
        try:
            ChatTemplate(text, {"bos_token": "<s>", "eos_token": "</s>"}).render(
                MESSAGES, generation_prompt=True
            )
        except ChatError as error:
            said.append(str(error))
    assert [reason for reason in said if "\n" in reason] == []


def test_mutated_templates_render_or_are_refused(template_texts):
    fuzz(template_texts, 200, seed=0)


@pytest.mark.soak
def test_many_mutated_templates_render_or_are_refused(template_texts):
    fuzz(template_texts, 2000, seed=1)
