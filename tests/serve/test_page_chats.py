"""The list of chats on the page: search, export, import and deletion."""

import json

from page_browser import ask, expect, finish, pieces, shows, stored, texts


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
