"""The chat page in a real Chromium: fixtures that open it before a server, and functions that use it."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "bench"))

from scripted_chat import ScriptedChat, pieces

CHROMIUM = Path("/usr/bin/chromium")
WATCH = """window.violations = [];
document.addEventListener("securitypolicyviolation",
    (event) => violations.push(event.violatedDirective + " " + event.blockedURI));"""


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM.exists():
        pytest.skip("needs /usr/bin/chromium")
    with pytest.importorskip("playwright.sync_api").sync_playwright() as playwright:
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


def expect(locator):
    """Return Playwright's assertions about a locator, which wait until they hold."""
    from playwright import sync_api

    return sync_api.expect(locator)


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
    expect(page.locator(selector)).to_have_text(expected, timeout=10_000)


def stored(page):
    """Return what the browser has stored: chats and messages."""
    return page.evaluate(
        """() => new Promise((resolve) => { indexedDB.open("herd").onsuccess = ({target: {result: db}}) => {
            const transaction = db.transaction(["chats", "messages"]);
            const all = ["chats", "messages"].map((name) => transaction.objectStore(name).getAll());
            transaction.oncomplete = () => (db.close(), resolve(all.map((request) => request.result)));
        } })"""
    )
