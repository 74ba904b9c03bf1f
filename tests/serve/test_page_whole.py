"""The whole page: hostile text in every place, accessibility, and a phone's width."""

import json
import os
from pathlib import Path

import pytest
from page_browser import ask, expect, finish, pieces

AXE = Path(os.environ.get("HERD_AXE", Path(__file__).parents[2] / "node_modules" / "axe-core" / "axe.min.js"))
PAYLOADS = (Path(__file__).parent / "xss_payloads.txt").read_text(encoding="utf-8").splitlines()


def hostile_chats():
    """Return an export in which every text is a payload, one turn for each payload."""
    messages, parent = [], ""
    for number, payload in enumerate(PAYLOADS):
        call = {"id": payload, "name": payload, "arguments": payload, "content": payload}
        answer = {"content": payload, "reasoning": payload, "calls": [call], "end": "stop", "model": payload}
        problem = {"text": payload, "code": payload, "cure": payload}
        herd = {"warnings": [payload], "cost": {"amount": payload, "currency": payload}}
        for role, more in [
            ("user", {"content": payload, "files": [{"name": payload, "text": payload}]}),
            ("assistant", answer | {"problem": problem, "herd": herd}),
            ("tool", {"results": [call]}),
            ("assistant", {"content": f"a\n\n{payload}\n\nb **{payload}**", "end": "stop", "model": payload}),
        ]:
            name, created = f"{number}-{len(messages)}", len(messages)
            messages.append(
                {"id": name, "parent": parent, "role": role, "lane": 0, "created": created} | more
            )
            parent = name
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
