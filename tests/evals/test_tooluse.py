"""Tool use with scripted models: one that does everything right, and ones that fail in every way."""

import json

import pytest

from herd.data.dialogs import make_dialogs
from herd.engine import Completion, Engine
from herd.errors import DataError
from herd.evals.tooluse import tool_items, tool_use
from herd.text.chat_format import render

N = 36


@pytest.fixture(scope="module")
def items():
    return tool_items(N, seed=3)


@pytest.fixture
def scripted(monkeypatch, tokenizer, make_model):
    """A model whose answers are ``say(dialog, round)``: text, or (text, finish reason)."""

    def install(items, say):
        rendered = {}
        for i, dialog in enumerate(items):
            ids = render(
                dialog.prompt, tokenizer, tool_call_format=dialog.tool_call_format, generation_prompt=True
            )
            rendered[tuple(ids.ids)] = i
        rounds = []

        def run(self, requests):
            rounds.append(len(requests))
            out = []
            for request in requests:
                ids = tuple(request.prompt_ids)
                which = next(i for head, i in rendered.items() if ids[: len(head)] == head)
                said = say(items[which], len(rounds) - 1)
                text, reason = said if isinstance(said, tuple) else (said, "stop")
                out.append(Completion([], text, reason))
            return out

        monkeypatch.setattr(Engine, "run", run)
        return make_model(0, max_context=8192), rounds

    return install


def written(call, tool_call_format):
    """A call as a model writes it."""
    name, arguments = call["name"], call["arguments"]
    if name == "code_interpreter":
        return "<|python_tag|>" + arguments["code"]
    if tool_call_format == "builtin":
        return (
            f"<|python_tag|>{name}.call("
            + ", ".join(f"{k}={json.dumps(v)}" for k, v in arguments.items())
            + ")"
        )
    if tool_call_format == "function":
        return f"<function={name}>{json.dumps(arguments)}</function>"
    return json.dumps({"type": "function", "name": name, "parameters": arguments})


def right(dialog, turn):
    return written(dialog.call, dialog.tool_call_format) if turn == 0 else dialog.messages[-1]["content"]


def test_items_need_tools_and_come_in_all_kinds(items):
    assert len(items) == N
    assert all(dialog.call for dialog in items)
    assert {dialog.tool_call_format for dialog in items} == {"json", "builtin", "function"}
    assert len({dialog.lang for dialog in items}) >= 6
    assert tool_items(10, seed=3) == items[:10]
    assert {dialog.lang for dialog in tool_items(5, languages=["de"])} == {"de"}


def test_right_calls_and_answers(scripted, items, tokenizer):
    model, rounds = scripted(items, right)
    use = tool_use(model, tokenizer, items)
    score = use.score()
    assert (score.name, score.value, score.n, score.unit) == ("tool_use", 1.0, N, "fraction")
    assert score.detail["call_ok"] == 1
    assert sum(part["n"] for part in score.detail["by_form"].values()) == N
    assert sum(part["n"] for part in score.detail["by_lang"].values()) == N
    assert set(score.detail["by_task"]) <= {"arithmetic", "dates", "strings"}
    assert rounds == [N, N]  # in lockstep
    # the tools really ran, and what they gave is what the verified dialogs hold
    for answered in use.answered:
        got = [m["content"] for m in answered.produced if m["role"] == "ipython"]
        assert got == [m["content"] for m in answered.dialog.messages if m["role"] == "ipython"][-1:]
    json.dumps(score.record("x"))


def test_a_guess_without_a_call_is_wrong(scripted, items, tokenizer):
    model, rounds = scripted(items, lambda d, turn: d.messages[-1]["content"])
    use = tool_use(model, tokenizer, items)
    assert use.score().value == 0
    assert rounds == [N]
    assert use.verdicts[0].why == "no call"


def test_a_right_call_with_a_wrong_answer_is_wrong(scripted, items, tokenizer):
    model, _ = scripted(items, lambda d, turn: right(d, 0) if turn == 0 else "It is fine.")
    use = tool_use(model, tokenizer, items)
    assert (use.score().value, use.score().detail["call_ok"]) == (0, 1)


def test_answers_without_end_and_endless_calls_are_trouble(scripted, items, tokenizer):
    model, _ = scripted(items, lambda d, turn: (right(d, 0), "length"))
    assert tool_use(model, tokenizer, items).score().detail["trouble"] == {"no end": N}
    model, rounds = scripted(items, lambda d, turn: right(d, 0))
    score = tool_use(model, tokenizer, items).score()
    assert (score.value, score.detail["trouble"], rounds) == (0, {"keeps calling": N}, [N] * 3)


def test_prompts_beyond_the_context_are_wrong_and_said(items, tokenizer, make_model):
    score = tool_use(make_model(0, max_context=16), tokenizer, items).score()
    assert (score.value, score.detail["trouble"]) == (0, {"beyond the context": N})


def test_random_weights(items, tokenizer, make_model):
    """The whole way with a real engine."""
    use = tool_use(make_model(0, max_context=1024), tokenizer, items[:8], max_tokens=12)
    assert use.score().value == 0


def test_other_dialogs_can_be_asked(scripted, tokenizer):
    dialogs = make_dialogs(20, 1, split="test", tasks=("chat",), languages=("en",))
    model, _ = scripted(dialogs, lambda d, turn: d.messages[-1]["content"])
    assert tool_use(model, tokenizer, dialogs).score("chat").value == 1


def test_nothing_to_answer(tokenizer, make_model):
    with pytest.raises(DataError, match="no dialogs"):
        tool_use(make_model(0), tokenizer, [])
