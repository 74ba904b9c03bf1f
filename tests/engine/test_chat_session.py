"""Dialogs with a scripted engine: what is shown, what is kept, and what happens when something goes wrong."""

import pytest

from herd.engine import Delta, Engine, Sampling
from herd.engine.chat_session import ChatSession, End, Forgotten, complete
from herd.errors import EngineError
from herd.text.chat_format import render
from herd.text.tokenizer import Tokenizer
from herd.text.toolcall import Call, Content, Malformed
from herd.tools import ToolResult

JSON_CALL = '{"type": "function", "name": "calculator", "parameters": {"expression": "6*7"}}'


@pytest.fixture(scope="module")
def tok():
    return Tokenizer.train(["six times seven is forty-two, calculator expression parameters"] * 3, 560)


class Script:
    """A substitute for an engine that gives the next scripted answer, a few characters at a time."""

    def __init__(self, tokenizer, *answers, context=4000):
        self.tokenizer, self.context, self.answers, self.prompts = tokenizer, context, list(answers), []
        self.cancelled = 0

    def submit(self, request):
        self.prompts.append(list(request.prompt_ids))
        return _Scripted(self, self.answers.pop(0))


class _Scripted:
    def __init__(self, engine, answer):
        self.engine = engine
        text, reason = answer if isinstance(answer, tuple) else (answer, "stop")
        pieces = [text[i : i + 5] for i in range(0, len(text), 5)]
        self.deltas = iter([*(Delta(p, (1,)) for p in pieces), reason])

    def __iter__(self):
        return self

    def __next__(self):
        item = next(self.deltas)
        if isinstance(item, type):
            raise item
        return item if isinstance(item, Delta) else Delta("", (), item)

    def cancel(self):
        self.engine.cancelled += 1


def joined(events):
    """Return events with neighbouring text joined."""
    out = []
    for event in events:
        if isinstance(event, Content) and out and isinstance(out[-1], Content):
            out[-1] = Content(out[-1].text + event.text)
        else:
            out.append(event)
    return out


def calculate(call):
    return (
        (str(eval(call.arguments["expression"])), True)
        if call.name == "calculator"
        else ("error: unknown", False)
    )


def test_a_plain_answer_streams_text_and_is_kept(tok):
    engine = Script(tok, "Hello!", "Fine.")
    session = ChatSession(engine, system="Be kind.")
    assert joined(session.ask("Hi"))[0] == Content("Hello!")
    text, end = joined(session.ask("How are you?"))
    assert text == Content("Fine.")
    assert isinstance(end, End)
    assert (end.reason, end.n_tokens, end.context) == ("stop", 1, 4000)
    assert [m["content"] for m in session.messages] == ["Be kind.", "Hi", "Hello!", "How are you?", "Fine."]
    assert engine.prompts[1] == render(session.messages[:-1], tok, generation_prompt=True).ids
    session.reset()
    assert [m["role"] for m in session.messages] == ["system"]


@pytest.mark.parametrize(
    ("tool_call_format", "written", "name"),
    [
        ("json", JSON_CALL, "calculator"),
        ("function", '<function=calculator>{"expression": "6*7"}</function>', "calculator"),
        ("builtin", '<|python_tag|>wolfram_alpha.call(query="6*7")', "wolfram_alpha"),
    ],
)
def test_a_tool_is_called_and_the_answer_goes_on(tok, tool_call_format, written, name):
    engine = Script(tok, written, "It is 42.")
    seen = []
    session = ChatSession(
        engine, tool_call_format=tool_call_format, execute=lambda call: (seen.append(call), ("42", True))[1]
    )
    calling, result, text, end = joined(session.ask("6*7?"))
    assert (calling.call.name, calling.call.tool_call_format) == (name, tool_call_format)
    assert result == ToolResult(calling.call, "42", True)
    assert (text, end.reason) == (Content("It is 42."), "stop")
    assert seen == [calling.call]
    assert [m["role"] for m in session.messages] == ["user", "assistant", "ipython", "assistant"]
    # the second prompt is the dialog the renderer makes of these messages, in the form the model used
    assert (
        engine.prompts[1]
        == render(session.messages[:-1], tok, tool_call_format=tool_call_format, generation_prompt=True).ids
    )


def test_several_calls_run_in_order_and_a_failure_is_reported_to_the_model(tok):
    engine = Script(tok, JSON_CALL + "; " + JSON_CALL.replace("calculator", "oracle"), "Sorry.")
    events = joined(ChatSession(engine, execute=calculate).ask("x"))
    assert [type(e) for e in events] == [Call, Call, ToolResult, ToolResult, Content, End]
    assert [(e.content, e.ok) for e in events[2:4]] == [("42", True), ("error: unknown", False)]


def test_a_model_that_only_calls_tools_is_stopped(tok):
    session = ChatSession(Script(tok, *[JSON_CALL] * 9), execute=calculate)
    events = list(session.ask("x"))
    assert events[-1].reason == "rounds"
    assert sum(isinstance(e, Call) for e in events) == 5


def test_calls_are_reported_where_tools_are_offered_and_nothing_runs_them(tok):
    events = joined(ChatSession(Script(tok, JSON_CALL), tools=["wolfram_alpha"]).ask("x"))
    assert [type(e) for e in events] == [Call, End]


def test_an_answer_of_the_form_of_a_call_is_text_if_it_names_no_offered_tool(tok):
    answer = '{"name": "Alice", "parameters": {"role": "admin"}}'
    text, _ = joined(ChatSession(Script(tok, answer), tools=["wolfram_alpha"]).ask("x"))
    assert text == Content(answer)


@pytest.mark.parametrize(
    "answer",
    [
        '{"name": "Alice", "parameters": {"role": "admin"}}',
        '{"name": "f", "arguments": {}}',
        '[{"name": "Alice", "parameters": {"role": "admin"}}]',
        'Here it is: {"name": "Alice", "parameters": {}} and no more',
        JSON_CALL,
        '```json\n{"name": "x", "parameters": {"a": [1, 2]}}\n```',
        '<function=f>{"a": 1}</function>',
        '<tool_call>{"name": "f", "arguments": {}}</tool_call>',
        'brave_search.call(query="x")',
        "<|python_tag|>print(1)",
        '[f(x="y"), g()]',
        '{"type": "function", "name": "broken", "parameters": ',
    ],
)
def test_without_tools_an_answer_that_looks_like_a_call_is_text(tok, answer):
    session = ChatSession(Script(tok, answer, "Yes."))
    text, end = joined(session.ask("x"))
    assert (text, end.reason) == (Content(answer), "stop")
    assert session.messages[-1] == {"role": "assistant", "content": answer}
    list(session.ask("Sure?"))
    assert answer in tok.decode(session.engine.prompts[1])


def test_a_malformed_call_is_reported_and_stays_text(tok):
    broken = '{"type": "function", "name": "calculator", "parameters": {"expression": }'
    text, *rest = joined(ChatSession(Script(tok, broken), execute=calculate).ask("x"))
    events = [text, *rest]
    assert any(isinstance(e, Malformed) and "malformed" in e.reason for e in events)
    assert "".join(e.text for e in events if isinstance(e, Content)) == broken


def test_an_interrupted_answer_is_kept_as_far_as_it_came(tok):
    engine = Script(tok, ("one two three", KeyboardInterrupt), "Yes.")
    session = ChatSession(engine)
    with pytest.raises(KeyboardInterrupt):
        list(session.ask("Count"))
    assert session.messages[-1] == {"role": "assistant", "content": "one two three"}
    assert joined(session.ask("More?"))[0] == Content("Yes.")
    assert engine.cancelled == 2


def test_leaving_the_iterator_stops_the_answer(tok):
    engine = Script(tok, "one two three four")
    session = ChatSession(engine)
    answer = session.ask("Count")
    assert next(answer) == Content("one t")
    answer.close()
    assert engine.cancelled == 1
    assert session.messages[-1]["content"] == "one t"


def test_a_question_without_an_answer_is_removed(tok):
    session = ChatSession(Script(tok, ("", KeyboardInterrupt)))
    with pytest.raises(KeyboardInterrupt):
        list(session.ask("Hm"))
    assert session.messages == []


def test_a_full_context_is_an_error_and_leaves_the_dialog_as_it_was(tok):
    engine = Script(tok, "Hello!", context=60)
    session = ChatSession(engine)
    list(session.ask("Hi"))
    before = list(session.messages)
    with pytest.raises(EngineError, match=r"the context has 60: ask something shorter"):
        list(session.ask("A long question. " * 20))
    assert session.messages == before


def test_a_full_context_forgets_the_oldest_turns_and_says_so(tok):
    engine = Script(tok, *["Fine."] * 12, context=220)
    session = ChatSession(engine, system="Be kind.")
    forgotten = 0
    for number in range(12):
        events = joined(session.ask(f"Question {number}"))
        said = [event.turns for event in events if isinstance(event, Forgotten)]
        forgotten += sum(said)
        assert events[len(said)] == Content("Fine.")
        questions = [m["content"] for m in session.messages if m["role"] == "user"]
        assert questions == [f"Question {n}" for n in range(forgotten, number + 1)]
        assert session.messages[0] == {"role": "system", "content": "Be kind."}
        assert [m["role"] for m in session.messages[1:]] == ["user", "assistant"] * len(questions)
        assert len(engine.prompts[-1]) <= 220 - 220 // 4
    assert 0 < forgotten < 12


def test_a_full_context_after_a_call_leaves_the_dialog_as_it_was(tok):
    engine = Script(tok, JSON_CALL, context=300)
    session = ChatSession(engine, execute=lambda call: ("9" * 2000, True))
    with pytest.raises(EngineError, match="context has 300"):
        list(session.ask("x"))
    assert session.messages == []


def test_a_call_cut_off_by_max_tokens_is_not_run(tok):
    def never(call):
        raise AssertionError("ran a call of an unfinished answer")

    events = joined(ChatSession(Script(tok, (JSON_CALL, "length")), execute=never).ask("x"))
    assert events[-1].reason == "length"


def test_complete_continues_the_text(model, tokenizer):
    engine = Engine(model, tokenizer)
    *texts, end = complete(engine, "Once", Sampling(max_tokens=12))
    want = Engine(model, tokenizer).run
    from herd.engine import Request

    assert "".join(t.text for t in texts) == want([Request([256, *b"Once"], Sampling(max_tokens=12))])[0].text
    assert (end.reason, end.n_tokens, end.context_used) == ("length", 12, 17)


def test_chat_without_a_tokenizer_is_refused(model):
    with pytest.raises(EngineError, match="needs a tokenizer"):
        ChatSession(Engine(model, None))
    with pytest.raises(EngineError, match="needs a tokenizer"):
        list(complete(Engine(model, None), "x", Sampling()))
