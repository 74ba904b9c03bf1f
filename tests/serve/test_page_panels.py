"""The page's panels: settings, sign-in, the card of a model, usage and keys."""

import re

from page_browser import ask, expect, finish, shows, texts

from conftest import running, wait_until
from herd.serve.keys import SCOPES, KeyPolicy, create_key, find_key
from herd.serve.prices import TokenPrice, format_money, set_price
from herd.serve.server_tools import ServerTools
from herd.serve.usage import read_usage


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
