"""A chat on the page: messages, streamed answers, branches, tool calls and errors."""

import json
import re

import pytest
from page_browser import ask, expect, finish, pieces, shows, stored, texts
from test_server_tools import asked, call

from conftest import wait_until
from herd.serve.server_tools import ServerTools


def test_a_dialog_is_streamed_with_its_history_and_kept_over_a_reload(chat, open_page):
    chat.script = lambda body: [
        *pieces(f"# Title\n\nSome *{body['messages'][-1]['content']}*, `code`.\n\n```python\nx = 1\n```\n"),
        {
            "chunk": {
                "timings": {"predicted_per_second": 42.4},
                "herd": {"cost": {"amount": "0.0012", "currency": "EUR"}},
            }
        },
    ]
    page = open_page(chat.url)
    ask(page, "first")
    ask(page, "second")
    answer = page.locator(".answer").last
    assert answer.locator("h2").inner_text() == "Title"
    assert answer.locator("em").inner_text() == "second"
    assert answer.locator("pre .hl-number").inner_text() == "1"
    stats = answer.locator(".stats").inner_text()
    assert re.fullmatch(
        r"42 tokens/s · first after [\d.]+ s · 14 tokens · prompt \d+, \d+ cached · 0.0012 EUR", stats
    )
    first, second = chat.bodies
    assert first["messages"] == [{"role": "user", "content": "first"}]
    assert [message["role"] for message in second["messages"]] == ["user", "assistant", "user"]
    assert second["messages"][1]["content"].startswith("# Title\n\nSome *first*")
    assert second["stream_options"] == {"include_usage": True}
    before = texts(page, ".answer .text")
    page.reload()
    page.wait_for_selector(".answer pre")
    shows(page, ".answer .text", before)
    assert page.title() == "first · Herd"


def test_an_answer_appears_while_it_is_written_and_can_be_stopped(chat, open_page):
    chat.script = lambda body: ["Once upon ", "a time. ", *[0.05, "more "] * 400]
    page = open_page(chat.url)
    page.fill("#draft", "tell")
    page.press("#draft", "Enter")
    page.wait_for_selector(".answer[aria-busy=true] .text:has-text('more more')")
    expect(page.locator(".waiting")).to_have_count(0)
    page.press("#draft", "Escape")
    finish(page)
    assert re.fullmatch(r"([\d.]+ tokens/s · )?first after [\d.]+ s", page.locator(".stats").inner_text())
    expect(page.locator(".note")).to_have_text("Stopped.")
    text = page.locator(".answer .text").inner_text()
    assert text.startswith("Once upon a time. more")
    _, messages = stored(page)
    assert [
        (message["role"], message.get("end")) for message in sorted(messages, key=lambda m: m["created"])
    ] == [("user", None), ("assistant", "stopped")]
    chat.script = lambda body: ["yes"]
    ask(page, "and?")
    assert chat.bodies[-1]["messages"][1]["content"].startswith("Once upon a time. more")


def test_the_view_follows_an_answer_until_the_user_scrolls_up(chat, open_page):
    chat.script = lambda body: ["line\n\n"] * 60 + [0.01, "more\n\n"] * 60
    page = open_page(chat.url)
    distance = """() => { const {scrollHeight, scrollTop, clientHeight} = document.getElementById("scroller");
        return scrollHeight - scrollTop - clientHeight; }"""
    ask(page, "one")
    page.wait_for_function(f"() => ({distance})() < 2")
    expect(page.locator("#newest")).to_be_hidden()
    page.fill("#draft", "two")
    page.press("#draft", "Enter")
    page.wait_for_selector(".turn:last-child .answer :text('more')")
    page.mouse.move(700, 300)
    page.mouse.wheel(0, -600)
    finish(page)
    assert page.evaluate(distance) > 500
    page.click("#newest")
    page.wait_for_function(f"() => ({distance})() < 2")


def test_finished_blocks_are_not_drawn_again(chat, open_page):
    chat.script = lambda body: [
        "First paragraph.\n\n",
        "Second ",
        0.3,
        *[0.02, "word "] * 20,
        "\n\n- a\n",
        "- b\n\n",
        "End",
    ]
    page = open_page(chat.url)
    page.fill("#draft", "go")
    page.press("#draft", "Enter")
    page.wait_for_selector(".answer .text:has-text('Second')")
    page.evaluate(
        """() => { const block = document.querySelector(".answer .text").children[0]; window.first = block.firstChild;
            window.changes = 0;
            const observer = new MutationObserver((all) => (changes += all.length));
            observer.observe(block, {childList: true, subtree: true}); }"""
    )
    finish(page)
    assert page.evaluate("() => [changes, first.isConnected]") == [0, True]
    shows(page, ".answer .text li", ["a", "b"])


def test_an_edit_and_a_new_answer_are_branches(chat, open_page):
    numbers = iter(range(100))
    chat.script = lambda body: [f"{body['messages'][-1]['content']} {next(numbers)}"]
    page = open_page(chat.url)
    ask(page, "one")
    ask(page, "two")
    page.locator("[aria-label='Answer again']").first.click()
    finish(page)
    shows(page, ".answer .text", ["one 2"])
    shows(page, ".siblings", ["2/2"])
    page.click("[aria-label='Previous version']")
    expect(page.locator(".answer .text")).to_have_count(2)
    shows(page, ".answer .text", ["one 0", "two 1"])
    page.locator(".user").last.hover()
    page.locator("[data-edit]").last.click()
    page.fill(".edit textarea", "three")
    page.press(".edit textarea", "Enter")
    finish(page)
    shows(page, ".bubble", ["one", "three"])
    assert chat.bodies[-1]["messages"][:2] == chat.bodies[1]["messages"][:2]
    page.locator(".user [aria-label='Previous version']").click()
    expect(page.locator(".bubble").last).to_have_text("two")
    page.wait_for_timeout(300)  # the browser stores the choice in the background
    page.reload()
    page.wait_for_selector(".answer")
    shows(page, ".bubble", ["one", "two"])


def test_two_models_answer_side_by_side_each_with_its_own_history(chat, open_page):
    chat.models.append({"id": "big", "max_model_len": 4096})
    chat.script = lambda body: [f"{body['model']} {len(body['messages'])}"]
    page = open_page(chat.url)
    page.select_option("#models select >> nth=1", "big")
    ask(page, "hello")
    shows(page, ".beside .text", ["tiny 1", "big 1"])
    shows(page, ".beside h3", ["tiny", "big"])
    ask(page, "again")
    shows(page, ".beside .text", ["tiny 1", "big 1", "tiny 3", "big 3"])
    histories = {body["model"]: body["messages"][1]["content"] for body in chat.bodies[2:]}
    assert histories == {"tiny": "tiny 1", "big": "big 1"}


def test_tool_calls_are_cards_and_the_user_writes_their_results(chat, open_page):
    def script(body):
        if body["messages"][-1]["role"] == "tool":
            return ["It is cold."]
        call = {"index": 0, "id": "call_7", "function": {"name": "weather", "arguments": ""}}
        return [
            {"reasoning_content": "I need "},
            {"reasoning_content": "a tool."},
            {"tool_calls": [call]},
            {"tool_calls": [{"index": 0, "function": {"arguments": '{"city":'}}]},
            {"tool_calls": [{"index": 0, "function": {"arguments": ' "Oslo"}'}}]},
        ]

    chat.script = script
    page = open_page(chat.url)
    page.click("main > header [data-do=settings]")
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    page.fill("[name=tools]", json.dumps(tools))
    ask(page, "weather?")
    assert chat.bodies[0]["tools"] == tools
    assert page.locator(".thought div").text_content() == "I need a tool."
    assert page.locator(".calls h4").inner_text() == "weather"
    assert json.loads(page.locator(".calls pre").inner_text()) == {"city": "Oslo"}
    page.fill(".calls textarea", "-3 degrees")
    page.click(".calls button")
    page.wait_for_selector(".answer >> nth=1")
    finish(page)
    wait_until(lambda: texts(page, ".answer .text")[-1:] == ["It is cold."])
    call, result = chat.bodies[1]["messages"][-2:]
    function = {"name": "weather", "arguments": '{"city": "Oslo"}'}
    assert call["tool_calls"] == [{"id": "call_7", "type": "function", "function": function}]
    assert result == {"role": "tool", "tool_call_id": "call_7", "content": "-3 degrees"}


def test_tools_on_the_server_are_switched_on_and_their_calls_are_shown(tokenizer, open_page):
    script = [call("code_interpreter", code="print(6 * 7)")]
    with asked(tokenizer, ServerTools(["calculator", "python"]), script, ["It is ", "**42**."]) as (
        http,
        loop,
    ):
        page = open_page(str(http.base_url))
        page.click(".toolbox summary")
        page.check(".toolbox label:has-text('python') input")
        page.keyboard.press("Escape")
        expect(page.locator(".toolbox fieldset")).to_be_hidden()
        page.click(".toolbox summary")
        expect(page.locator(".toolbox fieldset")).to_be_visible()
        page.mouse.click(800, 200)
        expect(page.locator(".toolbox fieldset")).to_be_hidden()
        ask(page, "six times seven")
        assert page.locator(".step summary code").inner_text() == "code_interpreter"
        page.click(".step summary")
        assert next(text.strip() for text in page.locator(".step pre").all_inner_texts()) == "print(6 * 7)"
        assert page.locator(".step pre").nth(1).inner_text() == "42"
        assert page.locator(".step summary small").inner_text() == "42"
        assert page.locator(".answer .text strong").inner_text() == "42"
        page.reload()
        page.wait_for_selector(".step")  # it is kept with the chat
        ask(page, "and again?")
        text = tokenizer.decode(loop.requests[-1].prompt_ids)
        assert text.index("print(6 * 7)") < text.index("and again?")  # and is sent with it


@pytest.mark.parametrize(
    "content, ok, shown",
    [
        ("completed\n[stdout]4\n[/stdout] 2\n[/stdout]", True, "4\n[/stdout] 2"),
        ("completed", True, "The program printed nothing."),
        (
            "failed\n[stderr]code_interpreter: time limit of 5 s[/stderr]",
            False,
            "code_interpreter: time limit of 5 s",
        ),
        ("completed\n[stdout]a[/stdout]\n[stderr]b[/stderr]", True, "a\nb"),
        ("anything else", True, "anything else"),
    ],
)
def test_the_card_of_a_program_shows_what_it_printed(chat, open_page, content, ok, shown):
    step = {"id": "c", "name": "code_interpreter", "arguments": '{"code": "print(42)"}'}
    chat.script = lambda body: [
        {"herd_steps": [step]},
        {"herd_steps": [{**step, "content": content, "ok": ok}]},
        "Done.",
    ]
    page = open_page(chat.url)
    ask(page, "six times seven")
    page.click(".step summary")
    shows(page, ".step h5", ["Program", "Output" if ok else "Error"])
    assert page.locator(".step pre").nth(1).inner_text() == shown


def test_an_error_says_what_to_do(chat, open_page):
    page = open_page(chat.url)
    for status, code, says in [
        (400, "context_length_exceeded", "Leave out the oldest messages"),
        (429, "insufficient_quota", "higher budget"),
        (429, "rate_limit_exceeded", "asks to wait 7 s"),
        (503, "overloaded", "busy"),
        (403, "permission_denied", "Sign in"),
        (500, "other", "the server's log"),
    ]:
        error = {"message": f"no, because of {code}", "code": code}
        answer = {"status": status, "error": error, "headers": {"retry-after": "7"}}
        chat.script = lambda body, answer=answer: [answer]
        ask(page, "hi")
        expect(page.locator("#thread .problem").last).to_contain_text(error["message"])
        expect(page.locator("#thread .problem").last).to_contain_text(says)


def test_an_error_within_an_answer_keeps_what_was_written(chat, open_page):
    chat.script = lambda body: [
        "half ",
        {"error": {"message": "the server is stopping", "code": "overloaded"}},
    ]
    page = open_page(chat.url)
    ask(page, "hi")
    shows(page, ".answer .text", ["half"])
    expect(page.locator("#thread .problem")).to_contain_text("the server is stopping")


def test_a_chat_that_is_too_long_goes_on_without_its_oldest_messages(chat, open_page):
    too_long = {"status": 400, "error": {"message": "too long", "code": "context_length_exceeded"}}
    chat.script = lambda body: [too_long] if len(body["messages"]) > 6 else ["fine"]
    page = open_page(chat.url)
    for text in ["a", "b", "c", "d"]:
        ask(page, text)
    page.click("button:text('Leave out')")
    finish(page)
    assert [message["content"] for message in chat.bodies[-1]["messages"]] == ["c", "fine", "d"]
    wait_until(lambda: texts(page, ".answer .text")[-1:] == ["fine"])
    expect(page.locator(".cut")).to_have_count(1)


def test_a_long_paste_becomes_a_file_and_a_link_only_writes_the_draft(chat, open_page):
    page = open_page(f"{chat.url}?q=what%20is%20this")
    expect(page.locator("#draft")).to_have_value("what is this")
    assert chat.bodies == []
    text = "line with ``` a fence\n" * 200
    page.evaluate(
        """(text) => { const data = new DataTransfer(); data.setData("text/plain", text);
            const event = new ClipboardEvent("paste", {clipboardData: data, cancelable: true});
            document.getElementById("draft").dispatchEvent(event); }""",
        text,
    )
    expect(page.locator(".chip")).to_contain_text("Pasted text 1.txt")
    page.press("#draft", "Shift+Enter")
    page.press("#draft", "Enter")
    finish(page)
    content = chat.bodies[0]["messages"][0]["content"]
    assert content == f"what is this\n\nPasted text 1.txt:\n````\n{text}\n````"
    shows(page, ".bubble", ["what is this"])
    assert texts(page, ".file summary")[0].startswith("Pasted text 1.txt")
