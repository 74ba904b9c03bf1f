"""Tools on the server: who may use them, what each API shows of them, and what the ledger has of every step."""

import json
import sys
import time
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path

import anthropic
import httpx
import openai
import pytest
import sqlalchemy as sql

from conftest import CONTEXT, ScriptedGeneration, ScriptedLoop, running, wait_until
from herd.data.dialogs import make_dialogs
from herd.data.tool_dialogs import openai_messages, schemas
from herd.errors import ConfigError
from herd.serve.chat import ServedModel
from herd.serve.keys import KeyPolicy, TokenBudget, create_key
from herd.serve.prices import TokenPrice, set_price
from herd.serve.server_tools import RESULT_CHARACTERS, ServerTools
from herd.serve.settings import ServeSettings
from herd.serve.tables import days, requests
from herd.tools.mcp_servers import McpServers, ServerEntry

HOSTILE = Path(__file__).parent.parent / "tools" / "hostile_mcp.py"
ALL = KeyPolicy(tools=frozenset({"calculator", "python", "bad"}))
CALCULATOR = {"type": "herd", "name": "calculator"}
QUESTION = [{"role": "user", "content": "What is 6 * 7?"}]


def call(name: str, **arguments) -> str:
    return json.dumps({"type": "function", "name": name, "parameters": arguments})


SUM = call("calculator", expression="6*7")


class TurnsLoop(ScriptedLoop):
    """A scripted engine with one answer for each request after another. The last one is repeated."""

    def __init__(self, *turns):
        super().__init__()
        self.turns = [turn if isinstance(turn, list) else list(turn) for turn in turns]

    def submit(self, request, n=1):
        self.requests.append(request)
        pieces = self.turns[min(len(self.requests), len(self.turns)) - 1]
        new = [ScriptedGeneration(request, pieces, "stop") for _ in range(n)]
        self.generations += new
        return new


@pytest.fixture(scope="session")
def tools():
    servers = McpServers({"bad": ServerEntry(command=sys.executable, args=[str(HOSTILE), "big"])})
    tools = ServerTools(["calculator", "python"], servers)
    yield tools
    tools.close()


@contextmanager
def asked(tokenizer, tools, *turns, store=None, policy=ALL, **settings):
    """Yield a client of a server whose model writes ``turns``, and its loop."""
    loop = TurnsLoop(*turns)
    token = "none" if store is None else create_key(store, "alice", policy, actor="test")[1]
    served = ServedModel("m", loop, tokenizer, CONTEXT)
    with (
        running(served, ServeSettings(drain_seconds=1, **settings), store, tools) as url,
        httpx.Client(base_url=url, timeout=30, headers={"authorization": f"Bearer {token}"}) as http,
    ):
        yield http, loop


def chat(http, **body):
    response = http.post("/v1/chat/completions", json={"messages": QUESTION, "tools": [CALCULATOR], **body})
    assert response.status_code == 200, response.text
    return response.json()


def events(http, path, **body):
    text = http.post(path, json={"stream": True, **body}).text
    data = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    return [json.loads(each) for each in data if each != "[DONE]"]


def rows(store):
    with store.read() as connection:
        return list(connection.execute(sql.select(requests).order_by(requests.c.created_ms, requests.c.id)))


def test_a_chat_shows_the_step_and_the_answer(tokenizer, tools):
    with asked(tokenizer, tools, ["One moment.\n", SUM], ["It is ", "42."]) as (http, loop):
        whole = chat(http)
        message, choice = whole["choices"][0]["message"], whole["choices"][0]
        assert choice["finish_reason"] == "stop"
        assert message["content"] == "One moment.\n\nIt is 42."
        (step,) = message["herd_steps"]
        assert (step["name"], step["content"], step["ok"]) == ("calculator", "42", True)
        assert "tool_calls" not in message
        first, second = loop.requests
        assert len(second.prompt_ids) > len(first.prompt_ids)
        text = tokenizer.decode(second.prompt_ids)
        assert '"42"' in text or "42" in text
        assert "One moment." in text
        # usage is the sum of the steps, which are listed too
        steps = whole["herd"]["steps"]
        assert [each["prompt_tokens"] for each in steps] == [len(first.prompt_ids), len(second.prompt_ids)]
        assert (
            whole["usage"]["completion_tokens"] == sum(each["completion_tokens"] for each in steps) == 3 + 3
        )


@pytest.mark.parametrize("chatml", [False, True])
def test_the_interpreter_reads_in_service_as_in_training(tokenizer, tools, chatml):
    """A model that was tuned on generated dialogs gets prompts of the same tokens."""
    if chatml:
        tokenizer = tokenizer.with_settings(
            chat_template="{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
            tool_template=files("herd.text").joinpath("chatml_tools.jinja").read_text(encoding="utf-8"),
        )
    dialogs = make_dialogs(100, 0, languages=["en"], tool_call_formats=["builtin"], tasks=["dates"])
    dialog = next(each for each in dialogs if each.messages[0]["content"] == "Environment: ipython")
    user, calling, *_ = messages = openai_messages(dialog.messages)
    written = json.dumps(calling["tool_calls"][0])
    written = f"<tool_call>{written}</tool_call>" if chatml else written.replace("arguments", "parameters")
    with asked(tokenizer, tools, [written], [messages[-1]["content"]]) as (http, loop):
        answer = chat(http, messages=[user], tools=[{"type": "herd", "name": "python"}])
    assert answer["choices"][0]["message"]["content"] == messages[-1]["content"]
    for request, part in zip(loop.requests, (messages[:1], messages[:3]), strict=True):
        rendered = tokenizer.require_chat().render(part, tools=schemas(dialog), generation_prompt=True)
        assert tokenizer.decode(request.prompt_ids) == tokenizer.decode(rendered.ids)
        assert list(request.prompt_ids) == list(rendered.ids)


def test_a_stream_shows_the_same(tokenizer, tools):
    with asked(tokenizer, tools, ["One moment.\n", SUM], ["It is ", "42."]) as (http, _):
        chunks = events(http, "/v1/chat/completions", messages=QUESTION, tools=[CALCULATOR])
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"]]
        assert "".join(delta.get("content") or "" for delta in deltas) == "One moment.\n\nIt is 42."
        steps = [step for delta in deltas for step in delta.get("herd_steps", ())]
        assert [step.get("content") for step in steps] == [None, "42"]
        assert steps[0]["id"] == steps[1]["id"]
        ends = [chunk["choices"][0]["finish_reason"] for chunk in chunks if chunk["choices"]]
        assert ends == [None] * (len(ends) - 1) + ["stop"]


@pytest.mark.parametrize("stream", [False, True])
def test_every_step_is_billed_exactly(tokenizer, tools, store, stream):
    set_price(store, "m", TokenPrice(1_000_000, 0, 2_000_000), "EUR", "test")
    turns = ["x", SUM], [SUM], ["It is ", "42."]
    with asked(tokenizer, tools, *turns, store=store) as (http, loop):
        if stream:
            last = events(http, "/v1/chat/completions", messages=QUESTION, tools=[CALCULATOR],
                          stream_options={"include_usage": True})[-1]  # fmt: skip
        else:
            last = chat(http)
        wait_until(lambda: all(row.status == "completed" for row in rows(store)))
        prompts, completions = [len(each.prompt_ids) for each in loop.requests], [3, 2, 3]
        billed = sorted((row.prompt_tokens, row.completion_tokens) for row in rows(store))
        assert billed == sorted(zip(prompts, completions, strict=True))
        assert last["usage"]["prompt_tokens"] == sum(prompts)
        assert last["usage"]["completion_tokens"] == sum(completions)
        with store.read() as connection:
            (day,) = connection.execute(sql.select(days)).all()
        assert (day.requests, day.prompt_tokens, day.completion_tokens) == (1, sum(prompts), 8)
        assert day.reserved_tokens == day.reserved_money == 0
        assert day.money == sum(prompts) + 2 * 8  # a millionth each
        assert float(last["herd"]["cost"]["amount"]) == pytest.approx(day.money / 1e6)


def test_a_client_that_leaves_between_steps_pays_what_it_got(tokenizer, tools, store):
    code = call("code_interpreter", code="import time; time.sleep(2)")
    with asked(tokenizer, tools, ["Wait.\n", code], ["done"], store=store) as (http, loop):
        body = {"messages": QUESTION, "tools": [{"type": "code_interpreter"}], "stream": True}
        with http.stream("POST", "/v1/chat/completions", json=body) as response:
            for line in response.iter_lines():
                if "herd_steps" in line:
                    break
        wait_until(lambda: all(row.status == "cancelled" for row in rows(store)))
        ((row,), n_prompt) = rows(store), len(loop.requests[0].prompt_ids)
        assert (row.prompt_tokens, row.completion_tokens) == (n_prompt, 3)
        time.sleep(0.2)
        assert len(loop.requests) == 1  # nothing goes on without a client


def test_an_unstreamed_client_that_leaves_pays_nothing(tokenizer, tools, store):
    code = call("code_interpreter", code="import time; time.sleep(1)")
    with asked(tokenizer, tools, [code], [0.3, "never"] * 99, store=store) as (http, loop):
        with pytest.raises(httpx.ReadTimeout):
            http.post("/v1/chat/completions", timeout=2,
                      json={"messages": QUESTION, "tools": [{"type": "code_interpreter"}]})  # fmt: skip
        wait_until(lambda: all(row.status == "cancelled" for row in rows(store)))
        assert len(loop.requests) == 2
        assert [row.money + row.prompt_tokens + row.completion_tokens for row in rows(store)] == [0, 0]


def test_a_budget_that_ends_between_steps_ends_the_answer(tokenizer, tools, store):
    policy = KeyPolicy(tools=ALL.tools, budgets=(TokenBudget(unit="tokens", period="day", amount=3000),))
    with asked(tokenizer, tools, [SUM], store=store, policy=policy, tool_steps=99) as (http, loop):
        response = http.post(
            "/v1/chat/completions", json={"messages": QUESTION, "tools": [CALCULATOR], "max_tokens": 60}
        )
        assert response.status_code == 429
        assert "budget" in response.json()["error"]["message"]
        wait_until(lambda: all(row.status == "failed" for row in rows(store)))
        assert len(loop.requests) > 1
        assert all(row.reserved_tokens == 0 for row in rows(store))


@pytest.mark.parametrize(
    ("policy", "tool", "runs"),
    [
        (KeyPolicy(), CALCULATOR, False),
        (KeyPolicy(tools=frozenset({"python"})), CALCULATOR, False),
        (KeyPolicy(tools=frozenset({"python"})), {"type": "code_interpreter"}, True),
        (KeyPolicy(tools=frozenset({"bad"})), {"type": "mcp", "server_label": "bad"}, True),
        (ALL, {"type": "mcp", "server_label": "bad", "server_url": "http://169.254.169.254/"}, False),
        (ALL, {"type": "mcp", "server_label": "bad", "allowed_tools": ["other"]}, False),
        (ALL, {"type": "mcp_toolset", "mcp_server_name": "bad"}, True),
        (ALL, {"type": "herd", "name": "bad_echo"}, True),
        (ALL, {"type": "herd", "name": "shell"}, False),
        (ALL, {"type": "web_search"}, False),
    ],
)
def test_a_key_gets_the_tools_that_it_was_granted(tokenizer, tools, store, policy, tool, runs):
    with asked(tokenizer, tools, ["hello"], store=store, policy=policy) as (http, loop):
        response = http.post("/v1/chat/completions", json={"messages": QUESTION, "tools": [tool]})
        assert response.status_code == 200
        assert ("x-herd-warnings" in response.headers) is not runs
        text = tokenizer.decode(loop.requests[0].prompt_ids)
        assert ("parameters" in text or "Environment: ipython" in text) is runs
        listed = {each["group"] for each in http.get("/herd/v1/tools").json()["tools"]}
        assert listed == set(policy.tools)


def test_a_tool_that_was_not_granted_does_not_run_when_the_model_calls_it(tokenizer, tools, store):
    with asked(tokenizer, tools, [SUM], ["no"], store=store, policy=KeyPolicy()) as (http, loop):
        function = {"type": "function", "function": {"name": "other"}}
        message = chat(http, tools=[CALCULATOR, function])["choices"][0]["message"]
        assert message["tool_calls"][0]["function"]["name"] == "calculator"  # the client's to run
        assert len(loop.requests) == 1


def test_a_call_of_the_client_ends_the_turn_after_those_of_the_server(tokenizer, tools):
    function = {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object"}}}
    with asked(tokenizer, tools, [f"{SUM}; {call('get_time')}"], ["never"]) as (http, loop):
        choice = chat(http, tools=[CALCULATOR, function])["choices"][0]
        assert choice["finish_reason"] == "tool_calls"
        assert [each["function"]["name"] for each in choice["message"]["tool_calls"]] == ["get_time"]
        assert choice["message"]["herd_steps"][0]["content"] == "42"
        assert len(loop.requests) == 1
        loop.requests.clear()
        chunks = events(http, "/v1/chat/completions", messages=QUESTION, tools=[CALCULATOR, function])
        calls = [
            c
            for chunk in chunks
            if chunk["choices"]
            for c in chunk["choices"][0]["delta"].get("tool_calls", ())
        ]
        assert {each["index"] for each in calls} == {0}
        # the client sends the message back with its result, and the model sees the server's call again
        id_ = choice["message"]["tool_calls"][0]["id"]
        result = {"role": "tool", "tool_call_id": id_, "content": "noon"}
        back = [*QUESTION, choice["message"], result]
        http.post("/v1/chat/completions", json={"messages": back})
        text = tokenizer.decode(loop.requests[-1].prompt_ids)
        assert text.index("6*7") < text.index("42") < text.index("get_time") < text.index("noon")


def test_a_client_function_may_not_take_the_name_of_a_server_tool(tokenizer, tools):
    function = {"type": "function", "function": {"name": "calculator"}}
    with asked(tokenizer, tools, ["x"]) as (http, _):
        response = http.post(
            "/v1/chat/completions", json={"messages": QUESTION, "tools": [CALCULATOR, function]}
        )
        assert response.status_code == 400
        response = http.post(
            "/v1/chat/completions", json={"messages": QUESTION, "tools": [CALCULATOR], "n": 2}
        )
        assert response.json()["error"]["param"] == "n"


def test_the_steps_are_limited(tokenizer, tools):
    with asked(tokenizer, tools, [SUM], tool_steps=3) as (http, loop):
        answer = chat(http)
        assert answer["choices"][0]["finish_reason"] == "length"
        assert "after 3 steps" in answer["herd"]["warnings"][-1]
        assert len(loop.requests) == 3
    with asked(tokenizer, tools, [SUM], tool_tokens=400) as (http, loop):
        assert "used up" in chat(http)["herd"]["warnings"][-1]
        assert len(loop.requests) < 5
    with asked(tokenizer, tools, [SUM]) as (http, loop):
        assert chat(http, max_tokens=5)["choices"][0]["finish_reason"] == "length"
        assert [each.sampling.max_tokens for each in loop.requests] == [5, 3, 1]


def test_a_tool_that_must_be_called_is_called_once(tokenizer, tools):
    with asked(tokenizer, tools, [SUM], ["42"]) as (http, loop):
        chat(http, tool_choice="required")
        assert [each.constraint is not None for each in loop.requests] == [True, False]


def test_errors_of_tools_go_to_the_model(tokenizer, tools):
    turns = [call("calculator", expression="1/0")], [call("calculator", wrong=1)], ["sorry"]
    with asked(tokenizer, tools, *turns) as (http, loop):
        steps = chat(http)["choices"][0]["message"]["herd_steps"]
        assert [step["ok"] for step in steps] == [False, False]
        assert "divides by zero" in steps[0]["content"]
        assert "divides by zero" in tokenizer.decode(loop.requests[1].prompt_ids)


def test_a_tool_that_the_model_made_up_is_an_error_for_the_model(tokenizer, tools):
    with asked(tokenizer, tools, [call("maths", x=1)], ["42"]) as (http, loop):
        choice = chat(http)["choices"][0]
        assert choice["message"]["content"] == "42"
        assert "unknown tool 'maths'" in choice["message"]["herd_steps"][0]["content"]
        assert len(loop.requests) == 2


def test_long_results_are_cut_and_say_so(tokenizer, tools):
    with asked(tokenizer, tools, [call("bad_echo", message="hi")], ["much"]) as (http, _):
        answer = chat(http, tools=[{"type": "mcp", "server_label": "bad"}])
        choice = answer["choices"][0]
        content = choice["message"]["herd_steps"][0]["content"]
        assert RESULT_CHARACTERS < len(content) < RESULT_CHARACTERS + 60
        assert content.endswith("more characters were cut off]")
        assert choice["finish_reason"] == "length"  # it does not fit into this tiny context
        assert "the context is full" in answer["herd"]["warnings"][-1]


def test_programs_are_contained(tokenizer, tools, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("the key")
    hostile = f"""
import os, socket, subprocess
for attempt in (
    lambda: open({str(secret)!r}).read(), lambda: socket.create_connection(("127.0.0.1", 1)),
    lambda: subprocess.run(["id"]), lambda: os.kill({__import__("os").getpid()}, 9), lambda: os.listdir("/proc"),
):
    try:
        print("DONE", attempt())
    except Exception as error:
        print(type(error).__name__)
print(sorted(os.environ))
"""
    with asked(tokenizer, tools, [call("code_interpreter", code=hostile)], ["ok"]) as (http, _):
        step = chat(http, tools=[{"type": "code_interpreter"}])["choices"][0]["message"]["herd_steps"][0]
        assert step["ok"]
        assert "DONE" not in step["content"]
        assert "the key" not in step["content"]
        assert "HOME" not in step["content"]


def test_responses_have_items(tokenizer, tools):
    turns = (
        [call("calculator", expression="1/0")],
        [call("code_interpreter", code="print(6*7)")],
        ["It is 42."],
    )
    asked_tools = [CALCULATOR, {"type": "code_interpreter", "container": {"type": "auto"}}]
    with asked(tokenizer, tools, *turns) as (http, loop):
        client = openai.OpenAI(
            base_url=f"{http.base_url}/v1", api_key="none", _strict_response_validation=True
        )
        whole = client.responses.create(model="m", input="hi", tools=asked_tools)
        assert [item.type for item in whole.output] == ["mcp_call", "code_interpreter_call", "message"]
        assert whole.output[0].status == "failed"
        assert "42" in whole.output[1].outputs[0].logs
        assert whole.output_text == "It is 42."
        loop.requests.clear()
        stream = list(client.responses.create(model="m", input="hi", tools=asked_tools, stream=True))
        kinds = [event.type for event in stream]
        assert "response.mcp_call.failed" in kinds
        assert "response.code_interpreter_call.completed" in kinds
        streamed = stream[-1].response

        def shape(response):
            return [item.model_dump(exclude={"id"}) for item in response.output]

        assert shape(streamed) == shape(whole)
        items = [item.model_dump() for item in whole.output]
        client.responses.create(model="m", input=[{"role": "user", "content": "hi"}, *items,
                                                  {"role": "user", "content": "again"}])  # fmt: skip
        text = tokenizer.decode(loop.requests[-1].prompt_ids)
        assert (
            text.index("1/0") < text.index("divides by zero") < text.index("print(6*7)") < text.index("again")
        )


def test_messages_have_blocks(tokenizer, tools):
    with asked(tokenizer, tools, ["Hm.\n", SUM], ["It is 42."]) as (http, loop):
        client = anthropic.Anthropic(base_url=str(http.base_url), api_key="none")
        asking = {"model": "m", "max_tokens": 99, "messages": QUESTION, "tools": [CALCULATOR]}
        whole = client.messages.create(**asking)
        blocks = [block.model_dump() for block in whole.content]
        assert [block["type"] for block in blocks] == ["text", "mcp_tool_use", "mcp_tool_result", "text"]
        assert blocks[1]["input"] == {"expression": "6*7"}
        assert blocks[2]["content"][0]["text"] == "42"
        loop.requests.clear()
        stream = events(http, "/v1/messages", **asking)
        starts = [
            event["content_block"]["type"] for event in stream if event["type"] == "content_block_start"
        ]
        assert starts == ["text", "mcp_tool_use", "mcp_tool_result", "text"]
        assert [event["index"] for event in stream if event["type"] == "content_block_stop"] == [0, 1, 2, 3]
        back = [*QUESTION, {"role": "assistant", "content": blocks}, {"role": "user", "content": "again"}]
        client.messages.create(**asking | {"messages": back})
        text = tokenizer.decode(loop.requests[-1].prompt_ids)
        assert text.index("Hm.") < text.rindex("6*7") < text.index("It is 42.") < text.index("again")


def test_ollama_has_steps(tokenizer, tools):
    with asked(tokenizer, tools, [SUM], ["It is 42."]) as (http, loop):
        asking = {"model": "m", "messages": QUESTION, "tools": [CALCULATOR]}
        whole = http.post("/api/chat", json={**asking, "stream": False}).json()
        assert whole["message"]["content"] == "It is 42."
        assert whole["message"]["herd_steps"][0]["content"] == "42"
        loop.requests.clear()
        lines = [json.loads(line) for line in http.post("/api/chat", json=asking).text.splitlines()]
        assert [len(line["message"].get("herd_steps", ())) for line in lines] == [1, 1, 0, 0]


@pytest.mark.parametrize(
    ("servers", "told"),
    [
        ({"python": "good"}, "the name of a builtin tool"),
        ({"x" * 61: "good"}, "at most 64"),
        ({"a_b": "good", "a": "prefixed"}, "two servers have a tool of this name"),
    ],
)
def test_names_that_collide_are_refused_at_the_start(servers, told):
    entries = {
        n: ServerEntry(command=sys.executable, args=[str(HOSTILE), mode]) for n, mode in servers.items()
    }
    with McpServers(entries) as started, pytest.raises(ConfigError, match=told):
        ServerTools([], started)
