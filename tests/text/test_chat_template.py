"""The Jinja template, run by `transformers`, gives the ids of `render` wherever Jinja can say it."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_strategies import CALCULATOR, DIALOG, QUESTION, dialogs, tool_call_formats

from herd.errors import ChatError
from herd.text import render

WEATHER = CALCULATOR | {"name": "weather", "description": "Wetter: ü"}


@pytest.fixture(scope="module")
def auto(small, tmp_path_factory):
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("template")
    small.save(folder)
    return AutoTokenizer.from_pretrained(folder)


def ids_by_template(auto, messages, **options) -> list[int]:
    ids = auto.apply_chat_template(messages, tokenize=True, return_dict=True, **options)["input_ids"]
    return list(ids)


def _sayable(messages) -> bool:
    """No text that begins with white space up to a line break, or spells a special token."""
    heads = [m["content"][: len(m["content"]) - len(m["content"].lstrip())] for m in messages]
    return not any("\n" in head or "\r" in head for head in heads) and "<|" not in str(messages)


@settings(max_examples=120)
@given(
    dialog=dialogs(),
    tool_call_format=tool_call_formats,
    builtin=st.lists(st.sampled_from(["brave_search", "code_interpreter"]), unique=True),
    custom=st.sampled_from([[], [CALCULATOR], [CALCULATOR, WEATHER]]),
    date=st.sampled_from([None, "23 July 2024"]),
    prompt=st.booleans(),
)
def test_the_template_gives_the_ids_of_the_renderer(
    small, auto, dialog, tool_call_format, builtin, custom, date, prompt
):
    if not _sayable(dialog):
        return
    same = {"tool_call_format": tool_call_format}
    ours = render(dialog, small, tools=[*builtin, *custom], date=date, generation_prompt=prompt, **same)
    theirs = {"tools": custom or None, "builtin_tools": builtin, "add_generation_prompt": prompt}
    dated = {"date_string": date} if date else {}
    assert ids_by_template(auto, dialog, **same, **theirs, **dated) == ours.ids


def test_defaults_and_openais_shapes_agree(small, auto):
    assert ids_by_template(auto, DIALOG) == render(DIALOG, small).ids
    call = {"type": "function", "function": {"name": "calculator", "arguments": {"expression": "2 + 2"}}}
    dialog = [QUESTION, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "4"}]
    wrapped = [{"type": "function", "function": CALCULATOR}]
    assert ids_by_template(auto, dialog, tools=wrapped) == render(dialog, small, tools=wrapped).ids


@pytest.mark.parametrize(
    "messages, options, message",
    [
        ([{"role": "robot", "content": "x"}], {}, "unknown role robot"),
        ([QUESTION, {"role": "system", "content": "x"}], {}, "must be the first"),
        ([QUESTION], {"tool_call_format": "xml"}, "tool_call_format must be"),
    ],
)
def test_the_template_refuses_what_the_renderer_refuses(auto, messages, options, message):
    from jinja2.exceptions import TemplateError

    with pytest.raises(TemplateError, match=message):
        ids_by_template(auto, messages, **options)


TEXT = {"type": "text", "text": "Hello"}
MORE = {"type": "text", "text": " there, é"}


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"role": "user", "content": [TEXT]}, "user<|end_header_id|>\n\nHello<|eot_id|>"),
        ({"role": "user", "content": [TEXT, MORE]}, "user<|end_header_id|>\n\nHello there, é<|eot_id|>"),
        ({"role": "user", "content": []}, "user<|end_header_id|>\n\n<|eot_id|>"),
        (
            {"role": "assistant", "content": [TEXT, MORE]},
            "assistant<|end_header_id|>\n\nHello there, é<|eot_id|>",
        ),
        ({"role": "assistant", "content": None}, "assistant<|end_header_id|>\n\n<|eot_id|>"),
        ({"role": "assistant"}, "assistant<|end_header_id|>\n\n<|eot_id|>"),
        ({"role": "assistant", "content": []}, "assistant<|end_header_id|>\n\n<|eot_id|>"),
        ({"role": "tool", "content": [TEXT, MORE]}, "ipython<|end_header_id|>\n\nHello there, é<|eot_id|>"),
        ({"role": "tool", "content": {"a": [1, None], "b": "é"}}, '\n\n{"a": [1, null], "b": "é"}<|eot_id|>'),
        ({"role": "ipython", "content": [1, "x"]}, 'ipython<|end_header_id|>\n\n[1, "x"]<|eot_id|>'),
        ({"role": "tool", "content": []}, "ipython<|end_header_id|>\n\n[]<|eot_id|>"),
        ({"role": "tool", "content": {}}, "ipython<|end_header_id|>\n\n{}<|eot_id|>"),
        ({"role": "tool", "content": 4.5}, "ipython<|end_header_id|>\n\n4.5<|eot_id|>"),
        ({"role": "tool", "content": False}, "ipython<|end_header_id|>\n\nfalse<|eot_id|>"),
    ],
)
def test_contents_of_every_type_are_the_same_in_both(small, auto, message, text):
    before = [QUESTION, DIALOG[1]] if message["role"] in ("tool", "ipython") else [QUESTION]
    dialog = [*before, message]
    ids = render(dialog, small).ids
    assert small.decode(ids).endswith(text)
    assert ids_by_template(auto, dialog) == ids


@pytest.mark.parametrize("content", ["Be kind.", [TEXT], [TEXT, MORE], "", []])
@pytest.mark.parametrize("date", [None, "23 July 2024"])
def test_a_developer_message_is_the_system_message(small, auto, content, date):
    dialogs = [[{"role": role, "content": content}, QUESTION] for role in ("developer", "system")]
    options = {"date_string": date} if date else {}
    developer, system = (render(dialog, small, date=date).ids for dialog in dialogs)
    assert developer == system == ids_by_template(auto, dialogs[0], **options)


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user"},
        {"role": "user", "content": None},
        {"role": "user", "content": {"a": 1}},
        {"role": "user", "content": [{"type": "image_url", "image_url": "x"}]},
        {"role": "system", "content": None},
        {"role": "developer", "content": [TEXT, {"type": "image"}]},
        {"role": "assistant", "content": 5},
    ],
)
def test_contents_that_neither_can_express_are_refused(small, auto, message):
    from jinja2.exceptions import TemplateError

    with pytest.raises(ChatError, match="content must be text"):
        render([message], small)
    with pytest.raises(TemplateError, match="content"):
        ids_by_template(auto, [message])
