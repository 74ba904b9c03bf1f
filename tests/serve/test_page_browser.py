"""The chat page in a real Chromium, against a server with scripted answers and against the real one."""

import json
import os
import re
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from test_server_tools import asked, call

from conftest import running, wait_until
from herd.serve.keys import SCOPES, KeyPolicy, create_key, find_key
from herd.serve.prices import TokenPrice, format_money, set_price
from herd.serve.server_tools import ServerTools
from herd.serve.usage import read_usage

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "bench"))
sync_api = pytest.importorskip("playwright.sync_api")

from scripted_chat import ScriptedChat, pieces  # noqa: E402

CHROMIUM = Path("/usr/bin/chromium")
AXE = Path(os.environ.get("HERD_AXE", ROOT / "node_modules" / "axe-core" / "axe.min.js"))
PAYLOADS = (Path(__file__).parent / "xss_payloads.txt").read_text(encoding="utf-8").splitlines()
WATCH = """window.violations = [];
document.addEventListener("securitypolicyviolation",
    (event) => violations.push(event.violatedDirective + " " + event.blockedURI));"""
expect = sync_api.expect


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM.exists():
        pytest.skip("needs /usr/bin/chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def served_script():
    chat = ScriptedChat(lambda body: [])
    with chat.running() as url:
        chat.url = url
        yield chat


@pytest.fixture
def chat(served_script):
    """The scripted server, with one model that repeats what the user wrote."""
    served_script.script = lambda body: pieces(f"You wrote: {body['messages'][-1]['content']}")
    served_script.key, served_script.models = "", [{"id": "tiny", "max_model_len": 8192}]
    served_script.bodies.clear()
    return served_script


class Watched:
    """What a page did that it must never do."""

    def __init__(self, page, origin):
        self.errors, self.dialogs, self.outside = [], [], []
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("dialog", lambda dialog: (self.dialogs.append(dialog.message), dialog.dismiss()))
        page.on("popup", lambda popup: self.outside.append(popup.url))
        page.context.on("request", lambda request: self._note(request.url, origin))

    def _note(self, url, origin):
        if not url.startswith((origin, "blob:", "data:")):
            self.outside.append(url)


@pytest.fixture
def open_page(browser):
    """Open the page of a server. In the end it must have had no error, no violation and no outside request."""
    opened = []

    def open_page(url, script="", **options):
        context = browser.new_context(**{"viewport": {"width": 1200, "height": 800}} | options)
        context.add_init_script(WATCH + script)
        page = context.new_page()
        page.set_default_timeout(30_000)
        opened.append((page, Watched(page, url.partition("?")[0])))
        page.goto(url)
        page.wait_for_selector("#models > *, dialog[open]")
        return page

    yield open_page
    for page, watched in opened:
        violations = page.evaluate("() => violations")
        page.context.close()
        assert (violations, watched.errors, watched.dialogs, watched.outside) == ([], [], [], [])


def ask(page, text):
    """Send a message and wait for the end of its answers."""
    page.fill("#draft", text)
    page.press("#draft", "Enter")
    finish(page)


def finish(page):
    """Wait until nothing is written any more."""
    page.wait_for_selector("#send:not([hidden])")


def texts(page, selector):
    return [text.strip() for text in page.locator(selector).all_text_contents()]


def shows(page, selector, expected):
    """Wait until the page shows these texts. It draws in the background."""
    with suppress(AssertionError):
        wait_until(lambda: texts(page, selector) == expected, 10)
    assert texts(page, selector) == expected


def stored(page):
    """Return what the browser has stored: chats and messages."""
    return page.evaluate(
        """() => new Promise((resolve) => { indexedDB.open("herd").onsuccess = ({target: {result: db}}) => {
            const transaction = db.transaction(["chats", "messages"]);
            const all = ["chats", "messages"].map((name) => transaction.objectStore(name).getAll());
            transaction.oncomplete = () => (db.close(), resolve(all.map((request) => request.result)));
        } })"""
    )


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


def test_settings_are_sent_and_wrong_ones_are_not(chat, open_page):
    page = open_page(chat.url)
    page.click("main > header [data-do=settings]")
    values = {
        "system": "Be brief.",
        "temperature": "0.5",
        "top_p": "7",
        "seed": "11",
        "max_tokens": "5",
        "tools": "[{",
    }
    for name, value in values.items():
        page.fill(f"[name={name}]", value)
    page.fill("[name=schema]", '{"type": "object"}')
    expect(page.locator(".wrong")).to_have_count(2)
    ask(page, "hi")
    body = chat.bodies[0]
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert {name: body.get(name) for name in values} == {
        "system": None,
        "temperature": 0.5,
        "top_p": None,
        "seed": 11,
        "max_tokens": 5,
        "tools": None,
    }
    assert body["response_format"]["json_schema"]["schema"] == {"type": "object"}
    page.click("#settings [type=reset]")
    ask(page, "hi")
    assert set(chat.bodies[1]) == {"model", "messages", "stream", "stream_options", "seed"}


def test_search_finds_a_message_of_another_branch_and_shows_it(chat, open_page):
    chat.script = lambda body: ["plain"] if len(chat.bodies) > 1 else ["a needle in the hay"]
    page = open_page(chat.url)
    ask(page, "alpha")
    page.locator("[aria-label='Answer again']").click()
    finish(page)
    page.keyboard.press("Control+Shift+O")
    ask(page, "beta")
    expect(page.locator(".bubble")).to_have_text("beta")
    page.keyboard.press("Control+k")
    page.keyboard.type("NEEDLE hay")
    page.keyboard.press(
        "Enter"
    )  # at once: it means this search, and not what was found for its first letters
    expect(page.locator(".bubble")).to_have_text("alpha")
    shows(page, ".answer .text", ["a needle in the hay"])


def test_an_export_imported_into_another_browser_is_the_same(chat, open_page, tmp_path):
    page = open_page(chat.url)
    ask(page, "one")
    page.locator("[aria-label='Answer again']").click()
    finish(page)
    page.fill("#title", "Renamed")
    page.press("#title", "Tab")
    with page.expect_download() as download:
        page.click("[data-do=export-all]")
    file = tmp_path / "chats.json"
    download.value.save_as(file)
    other = open_page(chat.url)
    other.set_input_files("#import", file)
    other.click("text=Renamed")
    other.wait_for_selector(".answer")
    assert stored(other) == stored(page)
    assert texts(other, ".siblings") == ["2/2"]


def test_a_damaged_file_is_not_imported(chat, open_page, tmp_path):
    circle = {"id": "m", "parent": "m", "role": "user"}
    page = open_page(chat.url)
    for number, damaged in enumerate(
        [
            "[",
            {"format": "other"},
            {"format": "herd-chats", "chats": [{"id": "a", "messages": [circle]}]},
            {"format": "herd-chats", "chats": [{"messages": []}]},
        ]
    ):
        file = tmp_path / f"chats{number}.json"
        file.write_text(json.dumps(damaged))
        page.evaluate("() => (document.getElementById('toast').firstElementChild.textContent = '')")
        page.set_input_files("#import", file)
        expect(page.locator("#toast")).to_contain_text("damaged")
    assert stored(page) == [[], []]


def test_a_server_with_keys_asks_for_one_and_keeps_it_as_long_as_wanted(chat, open_page):
    chat.key = "hk-secret"
    page = open_page(chat.url)
    page.fill("#key", "wrong")
    page.press("#key", "Enter")
    expect(page.locator("#signin-problem")).to_have_text("the key is wrong")
    page.fill("#key", "hk-secret")
    page.press("#key", "Enter")
    expect(page.locator("#models")).to_contain_text("tiny")
    ask(page, "hi")
    shows(page, ".answer .text", ["You wrote: hi"])
    assert page.evaluate("() => [localStorage.getItem('herd.key'), sessionStorage.getItem('herd.key')]") == [
        None,
        "hk-secret",
    ]
    chat.key = "hk-new"
    ask(page, "again")
    expect(page.locator("#signin")).to_be_visible()
    page.fill("#key", "hk-new")
    page.check("#keep")
    page.press("#key", "Enter")
    expect(page.locator("#signin")).to_be_hidden()
    page.click("text=Try again")
    finish(page)
    wait_until(lambda: texts(page, ".answer .text")[-1:] == ["You wrote: again"])
    assert page.evaluate("() => [localStorage.getItem('herd.key'), sessionStorage.getItem('herd.key')]") == [
        "hk-new",
        None,
    ]


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


def test_code_is_copied_and_a_deleted_chat_comes_back(chat, open_page):
    chat.script = lambda body: pieces("```js\nlet a = '<b>';\n```")
    page = open_page(chat.url, permissions=["clipboard-read", "clipboard-write"])
    ask(page, "hi")
    page.click("[data-copy=code]")
    assert page.evaluate("() => navigator.clipboard.readText()") == "let a = '<b>';"
    page.hover(".chat")
    page.click(".chat button")
    expect(page.locator(".chat")).to_have_count(0)
    page.click("#toast button")
    expect(page.locator(".chat")).to_have_count(1)
    assert len(stored(page)[1]) == 2


def hostile_chats():
    """Return an export in which every text is a payload, one turn for each payload."""
    messages, parent = [], ""
    for number, payload in enumerate(PAYLOADS):
        call = {"id": payload, "name": payload, "arguments": payload, "content": payload}
        answer = {"content": payload, "reasoning": payload, "calls": [call], "end": "stop", "model": payload}
        problem = {"text": payload, "code": payload, "cure": payload}
        for role, more in [
            ("user", {"content": payload, "files": [{"name": payload, "text": payload}]}),
            (
                "assistant",
                answer
                | {
                    "problem": problem,
                    "herd": {"warnings": [payload], "cost": {"amount": payload, "currency": payload}},
                },
            ),
            ("tool", {"results": [call]}),
            ("assistant", {"content": f"a\n\n{payload}\n\nb **{payload}**", "end": "stop", "model": payload}),
        ]:
            message = {
                "id": f"{number}-{len(messages)}",
                "parent": parent,
                "role": role,
                "lane": 0,
                "created": len(messages),
            }
            messages.append(message | more)
            parent = message["id"]
    chats = [
        {"id": f"c{number}", "title": payload, "models": [payload], "messages": [], "updated": 1 + number}
        for number, payload in enumerate(PAYLOADS)
    ]
    chats[0]["messages"] = messages
    return {"format": "herd-chats", "version": 1, "chats": chats}


SUSPICIOUS = """() => [...document.querySelectorAll(
    "#thread *, #chats *, #models *, #card *, #results *, #title")].flatMap((node) => [
    ...(/^(script|iframe|object|embed|img|image|video|audio|link|meta|base|style)$/i.test(node.tagName)
        ? [node.outerHTML] : []),
    ...[...node.attributes].filter(({name, value}) => /^on|^style$|^srcdoc$/i.test(name)
        || (/href|src|action/.test(name) && !/^(https?:|mailto:|#)/.test(value)))
        .map(({name, value}) => name + "=" + value),
])"""


def test_a_hundred_payloads_run_nowhere(chat, open_page, tmp_path):
    assert len(PAYLOADS) >= 100
    chat.models[:] = [
        {
            "id": payload,
            "max_model_len": 8192,
            "aliases": [payload],
            "meta": {"licence": payload, "evals": {payload: payload}},
        }
        for payload in PAYLOADS
    ]
    file = tmp_path / "hostile.json"
    file.write_text(json.dumps(hostile_chats()))
    page = open_page(chat.url)
    page.set_input_files("#import", file)
    expect(page.locator(".chat")).to_have_count(len(PAYLOADS))
    page.evaluate("() => (location.hash = '#c0')")
    page.wait_for_selector(".turn")
    while (count := page.locator(".turn").count()) < len(PAYLOADS):
        page.locator(".earlier").dispatch_event("click")
        page.wait_for_selector(f".turn >> nth={count}", state="attached")
    expect(page.locator(".turn")).to_have_count(len(PAYLOADS))
    assert page.evaluate(SUSPICIOUS) == []
    page.evaluate("() => document.querySelectorAll('details').forEach((node) => (node.open = true))")
    page.click("#models [data-do=card]")
    assert page.evaluate(SUSPICIOUS) == []
    page.keyboard.press("Escape")
    page.keyboard.press("Control+k")
    page.keyboard.type("<")
    page.wait_for_selector(".result")
    assert page.evaluate(SUSPICIOUS) == []


def test_a_hundred_payloads_run_nowhere_while_they_are_streamed(chat, open_page):
    chat.script = lambda body: [
        *({"reasoning_content": payload} for payload in PAYLOADS),
        *pieces("\n\n".join(PAYLOADS), 7),
        *(
            {"tool_calls": [{"index": n, "id": p, "function": {"name": p, "arguments": p}}]}
            for n, p in enumerate(PAYLOADS)
        ),
        {"error": {"message": PAYLOADS[0], "code": PAYLOADS[0]}},
    ]
    page = open_page(f"{chat.url}?q={PAYLOADS[12]}#{PAYLOADS[0]}")
    page.press("#draft", "Enter")
    finish(page)
    expect(page.locator(".calls section")).to_have_count(len(PAYLOADS))
    assert page.evaluate(SUSPICIOUS) == []
    assert "<script>alert(1)</script>" in page.locator(".answer .text").inner_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(chat, open_page, scheme):
    if not AXE.exists():
        pytest.skip("needs axe-core: npm install --no-save axe-core, or HERD_AXE=/path/to/axe.min.js")
    chat.models.append({"id": "big"})
    code = "```python\ndef f(x): return 'a'  # b\n```"
    text = f"# A\n\ntext [link](https://a.example) `code`\n\n{code}\n\n| a | b |\n|-|-|\n| 1 | 2 |\n\n- [x] c"
    call = {"index": 0, "id": "c", "function": {"name": "f", "arguments": "{}"}}
    chat.script = lambda body: [*pieces(text), {"tool_calls": [call]}]
    page = open_page(chat.url, script=AXE.read_text(encoding="utf-8"), color_scheme=scheme)
    page.select_option("#models select >> nth=1", "big")
    ask(page, "hello")
    page.wait_for_selector(".hl-keyword")
    page.locator("[aria-label='Answer again']").first.click()
    finish(page)
    chat.script = lambda body: [
        {"status": 400, "error": {"message": "too long", "code": "context_length_exceeded"}}
    ]
    ask(page, "hello")
    states = [
        lambda: None,
        lambda: page.click("main > header [data-do=settings]"),
        lambda: page.keyboard.press("Control+k"),
        lambda: (page.keyboard.press("Escape"), page.click("#models [data-do=card]")),
    ]
    for change in states:
        change()
        found = page.evaluate("async () => (await axe.run({resultTypes: ['violations']})).violations")
        assert [
            (each["id"], each["nodes"][0]["html"], each["nodes"][0]["failureSummary"])
            for each in found
            if each["impact"] in ("serious", "critical")
        ] == []


def test_a_phone_shows_everything_within_its_width(chat, open_page):
    chat.script = lambda body: pieces(
        "A" * 300 + "\n\n```\n" + "b" * 300 + "\n```\n\n| a | b |\n|-|-|\n| " + "c" * 200 + " | 2 |"
    )
    page = open_page(chat.url, viewport={"width": 390, "height": 844}, has_touch=True)
    ask(page, "x" * 300)
    assert page.evaluate(
        "() => [document.documentElement.scrollWidth, document.getElementById('scroller').scrollWidth]"
    ) == [390, 390]
    page.click("#open-side")
    page.click("text=New chat")
    expect(page.locator("#side")).to_be_hidden()
    expect(page.locator(".welcome")).to_be_visible()


def test_the_real_server_answers_the_page(url, open_page):
    page = open_page(url)
    page.click("main > header [data-do=settings]")
    page.fill("[name=max_tokens]", "8")
    ask(page, "six times seven")
    shows(page, "#thread .problem", [])
    assert re.search(r"8 tokens · prompt \d+", page.locator(".stats").inner_text())
    page.click("#models [data-do=card]")
    expect(page.locator("#card")).to_contain_text("2,048 tokens")


def test_a_key_signs_in_and_the_cost_of_an_answer_is_what_the_ledger_bills(served, store, open_page):
    _, token = create_key(store, "reader", KeyPolicy(), actor="test")
    set_price(store, "tiny", TokenPrice(100_000, 50_000, 900_000), "EUR", "test")
    with running(served, store=store) as url:
        page = open_page(url)
        page.fill("#key", token)
        page.press("#key", "Enter")
        expect(page.locator("#models")).to_contain_text("tiny")
        page.click("main > header [data-do=settings]")
        page.fill("[name=max_tokens]", "6")
        ask(page, "six times seven")
        stats = page.locator(".stats").inner_text()
    (usage,) = read_usage(store)
    assert usage.completion_tokens == 6
    assert usage.money > 0
    assert stats.endswith(f"· 6 tokens · prompt {usage.prompt_tokens} · {format_money(usage.money)} EUR")


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


def test_an_administrator_sees_usage_and_manages_keys_and_prompts(served, store, open_page):
    _, token = create_key(store, "root", KeyPolicy(scopes=frozenset(SCOPES)), actor="test")
    with running(served, store=store, tools=ServerTools(["calculator"])) as url:
        page = open_page(url)
        page.fill("#key", token)
        page.press("#key", "Enter")
        expect(page.locator("#models")).to_contain_text("tiny")
        page.click("main > header [data-do=settings]")
        page.fill("[name=max_tokens]", "3")
        page.fill("[name=system]", "Answer in rhymes.")
        ask(page, "hello")
        page.click("#usage-button")
        expect(page.locator("#usage svg.chart")).to_have_attribute(
            "aria-label", re.compile("1 requests, .* 3 answer")
        )
        new = page.locator("#usage form.new").first
        new.locator("[name=name]").fill("alice")
        new.locator("[name=budget]").fill("nonsense")
        new.locator("button").click()
        expect(page.locator("#usage .problem")).to_contain_text("500000 tokens/day")
        new.locator("[name=budget]").fill("1000 tokens/day")
        new.locator("[value=calculator]").check()
        new.locator("button").click()
        expect(page.locator(".token code")).to_contain_text("herd-")
        rows = page.locator("#usage .rows form:has-text('alice')")
        rows.locator("[name=budget]").fill("20 EUR/month")
        rows.locator("button:has-text('Save')").click()
        expect(rows.locator("[name=budget]")).to_have_value("20.00 EUR/month")
        alice = find_key(store, "alice")
        assert alice.policy.tools == {"calculator"}
        assert [(b.unit, b.amount) for b in alice.policy.budgets] == [("money", 20_000_000)]
        page.locator("#usage form.new").last.locator("input").fill("Rhymes")
        page.click("#usage form.new >> nth=1 >> button")
        expect(page.locator("#usage .rows p")).to_contain_text("Answer in rhymes.")
        page.click("#usage > .close")
        page.fill("[name=system]", "")
        page.select_option("#prompts select", "Rhymes")
        expect(page.locator("[name=system]")).to_have_value("Answer in rhymes.")
