"""Code blocks in text, and the program in an answer: every variant must compute what its author meant."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from herd.text.fenced import FencedBlock, defined_functions, fenced_blocks, python_program

GOOD = "def double(x):\n    return 2 * x\n"
WRONG = "def double(x):\n    return x\n"
HELPER = "import operator\nFACTOR = 2\ndef times(a, b):\n    return operator.mul(a, b)\n"
USES_HELPER = "def double(x):\n    return times(FACTOR, x)\n"
DOCSTRING = 'def double(x):\n    """Double.\n\n    ```\n    double(2)\n    ```\n    """\n    return 2 * x\n'


def fence(code, info="python"):
    return f"```{info}\n{code}```\n"


def indented(text, by):
    return "".join(f"{' ' * by}{line}" for line in text.splitlines(keepends=True))


def quoted(text, mark="> "):
    return "".join(f"{mark}{line}".rstrip(" ") for line in text.splitlines(keepends=True))


RIGHT = {
    "block quote": quoted(fence(GOOD)),
    "block quote without spaces": quoted(fence(GOOD), ">"),
    "block quote with words": "So:\n\n" + quoted(f"Use this:\n\n{fence(DOCSTRING)}") + "\nDone.",
    "block quote within another": quoted(quoted(fence(GOOD))),
    "block quote in a list": f"1. Write:\n{indented(quoted(fence(GOOD)), 3)}",
    "block quote right behind a number": f"1. {indented(quoted(fence(GOOD)), 3).lstrip()}",
    "block quote that ends before its fence": quoted(f"```python\n{GOOD}") + "\nDone.\n",
    "draft in a block quote": quoted(fence(WRONG)) + fence(GOOD),
    "python": fence(GOOD),
    "python3": fence(GOOD, "python3"),
    "py3 in capitals": fence(GOOD, "PY3"),
    "no language": fence(GOOD, ""),
    "spaces around the language": fence(GOOD, " python  "),
    "attributes": fence(GOOD, 'python title="double.py"'),
    "pandoc's braces": fence(GOOD, "{.python}"),
    "a language nobody knows": fence(GOOD, "solution"),
    "tildes": f"~~~python\n{GOOD}~~~\n",
    "four backticks": f"````python\n{GOOD}````\n",
    "windows line ends": fence(GOOD).replace("\n", "\r\n"),
    "words before the fence": f"Here you are: {fence(GOOD)}",
    "closing fence on the last line of code": f"```python\n{GOOD.rstrip()}```\nThat is all.",
    "list item": f"1. Write this:\n\n{indented(fence(GOOD), 3)}",
    "list item with a deep indent": f"- Write this:\n{indented(fence(GOOD), 8)}",
    "code indented, fence not": f"```python\n{indented(GOOD, 4)}```\n",
    "fence inside a docstring": fence(DOCSTRING),
    "helper first": f"First a helper.\n{fence(HELPER)}Then:\n{fence(USES_HELPER)}",
    "helper last": f"The function:\n{fence(USES_HELPER)}It needs this helper:\n{fence(HELPER)}",
    "helper of a helper": fence("def two():\n    return int('2')\n")
    + fence("def times(x):\n    return two() * x\n")
    + fence("def double(x):\n    return times(x)\n"),
    "helper that was corrected": fence("def times(a, b):\n    return a\n") + fence(HELPER) + fence(USES_HELPER),
    "names imported with a star": fence("from operator import *\n")
    + fence("def double(x):\n    return mul(2, x)\n"),
    "draft, then the correction": f"Draft:\n{fence(WRONG)}That forgets the factor:\n{fence(GOOD)}",
    "draft that does not parse": fence("def double(x:\n") + fence(GOOD),
    "draft that never ends": fence(f"{WRONG}while True: pass\n") + fence(GOOD),
    "draft in another language": fence("function double(x) { return x }\n", "js") + fence(GOOD),
    "usage in a block of its own": fence(GOOD) + fence("print(double(int(input())))\nassert double(1) == 3\n"),
    "output in a block of its own": fence(GOOD) + fence("4\n", "text"),
    "a shell command first": fence("pip install numpy\n", "bash") + fence(GOOD),
    "a session first": fence(">>> double(2)\n4\n") + fence(GOOD),
    "annotations from the future": fence(f"from __future__ import annotations\n{GOOD}"),
    "annotations from the future behind a comment": fence(f"# mine\nfrom __future__ import annotations\n{GOOD}"),
    "future in the second block": fence(HELPER) + fence(f"from __future__ import annotations\n{USES_HELPER}"),
    "main that reads input": fence(f'{GOOD}\nif __name__ == "__main__":\n    print(double(int(input())))\n'),
    "main, compared the other way": fence(f"{GOOD}\nif '__main__' == __name__:\n    input()\n"),
    "main with another branch": fence(f"{GOOD}\nif __name__ == '__main__':\n    input()\nelse:\n    pass\n"),
    "no fence": GOOD,
    "no fence, prose around": f"Sure, here's one:\n\n{GOOD}\nIt's short, isn't it?\nBye.",
    "no fence, one word behind": f"Sure:\n\n{GOOD}\nDone",
    "no fence, an import": f"From here it is easy.\n\nimport operator\n\n{GOOD}\nThis works: 2 * 2 = 4.",
    "no fence, a decorator": f"Sure:\n\nimport functools\n\n@functools.cache\n{GOOD}\nOK?",
    "no fence, prose between helper and function": f"Helper:\n\n{HELPER}\nThen this:\n\n{USES_HELPER}\nThat's it.",
    "no fence, in the line of the prose": "Sure! def double(x): return 2 * x",
    "no fence, draft and correction": f"Try:\n\n{WRONG}\nNo, that's wrong:\n\n{GOOD}\nGood.",
    "unclosed": f"```python\n{GOOD}",
    "unclosed, prose behind": f"Here:\n```python\n{GOOD}\nIt's done, I think.\n",
    "unclosed second block": fence(WRONG) + f"```python\n{GOOD}",
    "invalid escapes": fence('def double(x):\n    "\\d"\n    return 2 * x\n'),
    "a fence that is not code before it": "Use ``` to mark code.\n" + fence(GOOD),
    "prose with three backticks inside a line": "I write ```code``` so.\n" + fence(GOOD),
}  # fmt: skip
NOT_RIGHT = {
    "wrong": fence(WRONG),
    "the corrected version is wrong": fence(GOOD) + fence(WRONG),
    "only a usage": fence("print(double(2))\n"),
    "syntax error": fence("def double(x):\n    return 2 * x)\n"),
    "cut in the middle": "```python\ndef double(x):\n    return 2 *",
    "leaves early": fence(f"{GOOD}raise SystemExit\n"),
    "helper missing": fence(USES_HELPER),
    "another function": fence("def triple(x):\n    return 3 * x\n"),
    "only the idea": "Multiply by two.",
    "nested in another function": fence("def f():\n    def double(x):\n        return 2 * x\n"),
    "nothing": "",
}


def doubles(answer, name="double"):
    """Run the program in the answer, as a judge would. Only called on the literals of this file."""
    scope = {"__name__": "__main__"}
    try:
        exec(f"{python_program(answer, name)}\n\nresult = double(21)\n", scope)
    except (Exception, SystemExit):
        return False
    return scope["result"] == 42


@pytest.mark.parametrize("variant", RIGHT)
def test_the_program_is_found(variant):
    assert doubles(RIGHT[variant]), python_program(RIGHT[variant], "double")


@pytest.mark.parametrize("variant", [variant for variant in RIGHT if variant != "helper last"])
def test_without_a_name_the_last_function_is_meant(variant):
    assert doubles(RIGHT[variant], name="")


@pytest.mark.parametrize("variant", NOT_RIGHT)
def test_no_right_program_is_made_of_a_wrong_answer(variant):
    assert not doubles(NOT_RIGHT[variant])


def test_code_that_needs_no_change_is_returned_verbatim():
    code = "# a comment\ndef f( a ):  return  a\n"
    assert python_program(fence(code)) == code
    assert python_program("no program") == "no program"


def test_blocks_have_language_code_and_end():
    text = "a\n```Python3 x=1\nx\n```\n  ~~~\n  y\n    z\n  ~~~\n```\nopen"
    assert fenced_blocks(text) == [
        FencedBlock("python3", "x\n", True),
        FencedBlock("", "y\n  z\n", True),
        FencedBlock("", "open", False),
    ]


def test_the_end_of_a_block_quote_ends_its_code():
    text = "> ```\n> a\n> > b\nc\n```\n>>> d\n```\n"
    assert fenced_blocks(text) == [FencedBlock("", "a\n> b\n", False), FencedBlock("", ">>> d\n", True)]


def test_a_quoted_block_may_end_at_a_fence_without_the_mark_of_the_quote():
    text = '> ```json\n> {"a": 1}\n```\nDone.\n> ````\n> x\n```\n'
    assert fenced_blocks(text) == [
        FencedBlock("json", '{"a": 1}\n', True), FencedBlock("", "x\n", False), FencedBlock("", "", False),
    ]  # fmt: skip


def test_a_longer_fence_encloses_a_shorter_one():
    assert fenced_blocks("````md\n```\nx\n```\n````\n") == [FencedBlock("md", "```\nx\n```\n", True)]


def test_functions_of_the_top_level_are_listed():
    assert defined_functions("def f():\n    def g(): 1\nasync def h(): 1\nclass A: 1\n") == {"f", "h"}
    assert defined_functions("def f(:") == set()


@pytest.mark.parametrize(
    "text", ["(" * 100_000, "```python\n" + "[" * 100_000, "def f():\n\x00", "x = '\ud800'\ndef "]
)
def test_hostile_text_is_handled(text):
    assert isinstance(python_program(text), str)


@given(
    st.lists(
        st.sampled_from([*RIGHT.values(), *NOT_RIGHT.values(), "```", "~~~\n", "  ", "\n", "'"]), max_size=5
    )
)
def test_any_mixture_gives_a_text(parts):
    assert isinstance(python_program("".join(parts), "double"), str)
