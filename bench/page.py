"""Measure the chat page with a chat of 500 messages while an answer is streamed at 200 tokens a second.

A server with scripted answers takes the place of the engine, so that only the page is measured. In Chromium, for
each run with a cold cache: the time to the first contentful paint of the page with the chat in its address, and the
longest task of the page's main thread while it loads, while 2,000 tokens arrive, and while 2,000 tokens arrive and
the user has scrolled up until all 500 messages are drawn.

Tasks are measured in CPU time of the main thread, from Chromium's own trace, so that other programs on the machine do
not count. ``longest_task_wall`` is the same in wall time. The values are the worst of all runs, except for the first
paint, for which the trace has no CPU time: it is the fastest run, with the median beside it.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import time
from typing import Any

from playwright.sync_api import Browser, Page, sync_playwright

from common import at_most, bench_parser, save_receipt
from herd.serve import pages
from scripted_chat import Item, ScriptedChat

CHROMIUM = "/usr/bin/chromium"
N_MESSAGES, N_TOKENS, RATE = 500, 2000, 200
WORDS = ["the", "model", "reads", "a", "prompt", "and", "writes", "one", "token", "after", "another"]
CODE = "def area(width: float, height: float) -> float:\n    # in square metres\n    return width * height\n"
STORE = """([chat, messages]) => new Promise((resolve) => {
indexedDB.open("herd").onsuccess = ({target: {result: db}}) => {
    const transaction = db.transaction(["chats", "messages"], "readwrite");
    transaction.objectStore("chats").put(chat);
    for (const message of messages) transaction.objectStore("messages").put(message);
    transaction.oncomplete = () => (db.close(), resolve());
} })"""


def main() -> None:
    """Measure, and write the receipt."""
    parser = bench_parser(__doc__)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    chat = ScriptedChat(lambda body: timed(answer_tokens(random.Random(1))))
    with chat.running() as url, sync_playwright() as playwright:
        runs = []
        for number in range(options.runs):
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            runs.append(measure(browser, url))
            browser.close()
            shown = ", ".join(f"{name} {value:.0f}" for name, value in runs[-1].items())
            print(f"run {number + 1}: {shown}", flush=True)
    worst = {name: max(run[name] for run in runs) for name in runs[0]}
    paints = [run["paint"] for run in runs]
    _, files = pages.page_files()
    script = sum(len(file.compressed) for name, file in files.items() if name.endswith(".js"))

    save_receipt(
        "page",
        what=f"the chat page with {N_MESSAGES} messages while {N_TOKENS:,} tokens arrive at {RATE} per second",
        values={
            "first_paint": at_most(300, min(paints), "ms"),
            "first_paint_median": (statistics.median(paints), "ms"),
            "longest_task": at_most(50, worst["task"], "ms"),
            "longest_task_all_messages_drawn": at_most(50, worst["task_all"], "ms"),
            "longest_task_loading": at_most(50, worst["task_load"], "ms"),
            "longest_task_wall": (worst["task_wall"], "ms"),
            "compressed_script": at_most(60_000, script, "bytes"),
        },
        seed=1,
        notes=f"{options.runs} runs in headless Chromium; load average {os.getloadavg()[0]:.0f}. Tasks in CPU time.",
    )


def measure(browser: Browser, url: str) -> dict[str, float]:
    """Return the times of one run in milliseconds."""
    context = browser.new_context()
    page = context.new_page()
    page.goto(url)
    page.wait_for_selector(".welcome")
    page.evaluate(STORE, long_chat())
    page.close()
    page = context.new_page()
    client = context.new_cdp_session(page)
    client.send("Network.enable")
    client.send("Network.clearBrowserCache")
    browser.start_tracing(page=page, categories=["toplevel"])
    page.goto(f"{url}/#long")
    page.wait_for_selector(".answer .text > div", state="attached")
    paint = page.evaluate(
        """() => new Promise((resolve) => new PerformanceObserver((list) => resolve(list.getEntries()[0].startTime))
            .observe({type: "paint", buffered: true}))"""
    )
    time.sleep(1)
    loading, _ = longest_task(browser.stop_tracing())
    browser.start_tracing(page=page, categories=["toplevel"])
    stream(page)
    task, wall = longest_task(browser.stop_tracing())
    browser.start_tracing(page=page, categories=["toplevel"])
    stream(page, draw_all=True)
    task_all, _ = longest_task(browser.stop_tracing())
    context.close()
    return {"paint": paint, "task_load": loading, "task": task, "task_wall": wall, "task_all": task_all}


def longest_task(trace: bytes) -> tuple[float, float]:
    """Return the longest task of the busiest renderer's main thread in milliseconds of CPU and of wall time."""
    events = json.loads(trace)["traceEvents"]
    mains = {
        (event["pid"], event["tid"])
        for event in events
        if event.get("name") == "thread_name" and event["args"]["name"] == "CrRendererMain"
    }
    tasks: dict[tuple[int, int], list[tuple[float, float]]] = {main: [] for main in mains}
    for event in events:
        if (
            event.get("ph") == "X"
            and event["name"].endswith("RunTask")
            and (event["pid"], event["tid"]) in mains
        ):
            tasks[event["pid"], event["tid"]].append((event.get("tdur", 0) / 1e3, event["dur"] / 1e3))
    busiest = max(tasks.values(), key=len)
    assert len(busiest) > 50
    return max(cpu for cpu, _ in busiest), max(wall for _, wall in busiest)


def stream(page: Page, draw_all: bool = False) -> None:
    """Ask for an answer and wait for its end. ``draw_all``: meanwhile scroll up until all messages are drawn."""
    page.fill("#draft", "Go on.")
    page.press("#draft", "Enter")
    page.wait_for_selector("#stop:not([hidden])")
    if draw_all:
        page.evaluate(
            """() => new Promise((resolve) => { const up = () => {
                const button = document.querySelector(".earlier");
                if (!button) return resolve();
                document.getElementById("scroller").scrollTop = 0;
                button.click();
                setTimeout(up, 50);
            }; up(); })"""
        )
        assert page.locator(".turn").count() > N_MESSAGES // 2
        assert page.locator("#stop:not([hidden])").count() == 1
    page.wait_for_selector("#send:not([hidden])", timeout=120_000)
    time.sleep(0.5)
    assert page.locator("#thread .problem").count() == 0


def long_chat() -> list[Any]:
    """Return a chat of `N_MESSAGES` messages, half of them answers with lists, tables and code."""
    draw = random.Random(0)
    messages: list[dict[str, Any]] = []
    for number in range(N_MESSAGES):
        is_answer = number % 2 == 1
        content = "".join(answer_tokens(draw, 300)) if is_answer else " ".join(draw.choices(WORDS, k=30))
        fields = {"model": "tiny", "end": "stop", "settings": {}} if is_answer else {}
        parent = messages[-1]["id"] if messages else ""
        role = "assistant" if is_answer else "user"
        message = {
            "id": f"m{number:04}",
            "chat": "long",
            "parent": parent,
            "lane": 0,
            "role": role,
            "created": number,
        }
        messages.append(message | {"content": content} | fields)
    chat = {
        "id": "long",
        "title": "A long chat",
        "models": ["tiny"],
        "settings": {},
        "chosen": {},
        "created": 1,
        "updated": 2,
    }
    return [chat, messages]


def answer_tokens(draw: random.Random, n_tokens: int = N_TOKENS) -> list[str]:
    """Return the tokens of an answer in Markdown: paragraphs, a list, a table and code in turns."""
    tokens: list[str] = []
    while len(tokens) < n_tokens:
        words = [f"{word} " for word in draw.choices(WORDS, k=40)]
        tokens += [*words[:20], "**important** ", *words[20:], "\n\n"]
        tokens += [token for _ in range(4) for token in ("- ", *words[:6], "\n")] + ["\n"]
        tokens += ["```python\n", *(CODE[start : start + 4] for start in range(0, len(CODE), 4)), "```\n\n"]
        tokens += [
            "| a | b |\n",
            "|:--|--:|\n",
            *(f"| {word}| {number} |\n" for number, word in enumerate(words[:5])),
            "\n",
        ]
    return tokens[:n_tokens]


def timed(tokens: list[str]) -> list[Item]:
    """Return tokens with pauses for `RATE` of them per second, as a script of `ScriptedChat`."""
    return [item for token in tokens for item in (token, 1 / RATE)]


if __name__ == "__main__":
    main()
