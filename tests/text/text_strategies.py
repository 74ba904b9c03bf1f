"""A tool, a dialog, and strategies for any dialog, shared by this room's tests."""

from hypothesis import strategies as st

CALCULATOR = {
    "name": "calculator",
    "description": "Evaluates an arithmetic expression",
    "parameters": {
        "type": "object",
        "properties": {"expression": {"type": "string"}},
        "required": ["expression"],
    },
}
QUESTION = {"role": "user", "content": "What is 2 + 2?"}
CALL = {"role": "assistant", "tool_calls": [{"name": "calculator", "arguments": {"expression": "2 + 2"}}]}
DIALOG = [QUESTION, CALL, {"role": "ipython", "content": "4"}, {"role": "assistant", "content": "It is 4."}]

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(texts, inner, max_size=2),
    max_leaves=4,
)
names = st.sampled_from(["calculator", "brave_search", "weather"])
calls = st.fixed_dictionaries(
    {"name": names, "arguments": st.dictionaries(st.sampled_from(["a", "query", "n_1"]), values, max_size=3)},
    optional={"tool_call_format": st.sampled_from(["json", "builtin", "function"])},
)
code_calls = st.fixed_dictionaries(
    {"name": st.just("code_interpreter"), "arguments": st.fixed_dictionaries({"code": texts})}
)
tool_lists = st.sampled_from(
    [None, [CALCULATOR], ["code_interpreter", CALCULATOR], ["weather", "code_interpreter"]]
)
tool_call_formats = st.sampled_from(["json", "builtin", "function"])


@st.composite
def dialogs(draw) -> list[dict]:
    """A dialog the format can express, with whatever contents."""
    messages = [{"role": "system", "content": draw(texts)}] if draw(st.booleans()) else []
    messages.append({"role": "user", "content": draw(texts)})
    for _ in range(draw(st.integers(0, 4))):
        kind = draw(st.sampled_from(["user", "assistant", "calls", "code"]))
        if kind in ("user", "assistant"):
            messages.append({"role": kind, "content": draw(texts)})
            continue
        one = code_calls if kind == "code" else calls
        made = draw(
            st.lists(one, min_size=1, max_size=1) | st.lists(calls | code_calls, min_size=1, max_size=3)
        )
        messages.append({"role": "assistant", "content": draw(texts), "tool_calls": made})
        messages += [{"role": "ipython", "content": draw(texts)} for _ in made]
    return messages


# What a model may write: calls, broken calls and what looks like them, in any order.
FRAGMENTS = [
    '{"name": "f", "parameters": {"a": 1}}', '{"type": "function", "name": "g", "arguments": {}}',
    '{"name": "f", "parameters": {"a": "}{\\"<function=", "b": [1, {"c": null}]}}', '{"name": "f", "parameters": [',
    '{"name"', '{"name": f}', '{"a": 1}', '<function=f>{"a": 1}</function>', '<function=f>{"a": "</function>"}',
    "<function=f>x", "<function=", "</function>", '<function=f>{"a": ', "<|python_tag|>", "<|eom_id|>", "<|eot_id|>",
    'f.call(a="x")', 'f.call(a=1, b="\\")")', "f.call(a=", "f.call(x)", "f.call", 'brave_search.call(query="x;y")',
    "print(1)", "Hello ", "x", "; ", ";", "\n", "  ", "{", "}", '"', "\\", "<", "<|", "(", ")", "é", "1", ",",
]  # fmt: skip
messy_texts = st.lists(
    st.one_of(st.sampled_from(FRAGMENTS), st.text(st.characters(exclude_categories=["Cs"]), max_size=4)),
    max_size=10,
).map("".join)
