"""Teach SmolLM2 the code interpreter of `herd serve`, and let it answer questions: by API and on the page.

    python bench/serve_interpreter.py [--start FOLDER] [--screens FOLDER] [--commit]

1. The model that `bench/tune.py tools` taught other tools is tuned on dialogs with the interpreter. The result is kept
   for the next call.
2. Held-out questions are asked by API with the interpreter offered, before and after. A question counts if the server
   ran exactly one program, its output is right, and the answer states it. Small talk must be answered without one.
3. One of the questions is typed on the page in headless Chromium. The card must show the program and its output.

Hostile programs for the same tool: `bench/serve_mcp.py programs`. Needs Linux with Landlock and seccomp, Chromium, and
the text that is replayed in HERD_TEST_DATA.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import httpx
import torch
from playwright.sync_api import Page, sync_playwright

from common import DATA, WORK, bench_parser, save_receipt
from herd import checkpoint
from herd.data.dialogs import Dialog, stream_dialogs
from herd.data.scoring import score
from herd.engine import Engine
from herd.engine.loop import EngineLoop
from herd.evals.score import share
from herd.evals.tasks.data import Data
from herd.files import write_atomically
from herd.report.receipt import Value
from herd.serve.chat import ServedModel
from herd.serve.server_tools import ServerTools
from herd.text.messages import CODE_INTERPRETER
from herd.tune.options import TuneOptions
from herd.tune.run import open_run, tune
from page import CHROMIUM
from servers import serving
from tune import REPLAY, TOOL_LR, kept, printed, tool_dialogs, tool_rows

FOLDER = WORK / "interpreter"
START = WORK / "tune400k" / "tools" / "run" / "model"
N_LESSONS, N_OTHER_TOOLS, LESSON_TOKENS = 700, 200, 200_000
NEEDS_CODE = ("arithmetic", "dates", "strings")
N_QUESTIONS, N_SMALL_TALK, SEED = 100, 20, 11
INTERPRETER = {"type": "herd", "name": "python"}
SCREENS = {"light": (1200, 800, "light"), "dark": (1200, 800, "dark"), "phone": (390, 844, "light")}
"""Width, height and colours of the screenshots."""


def interpreter_dialogs(
    seed: int, split: str = "train", tasks: Sequence[str] = (*NEEDS_CODE, "chat")
) -> Iterator[Dialog]:
    """Yield endless English dialogs with the code interpreter as their only tool."""
    dialogs = stream_dialogs(seed, split=split, languages=["en"], tool_call_formats=["builtin"], tasks=tasks)
    alone = {"role": "system", "content": "Environment: ipython"}
    return (dialog for dialog in dialogs if dialog.messages[0] == alone)


def teach(start: Path) -> Path:
    """Tune a model that calls other tools on dialogs with the interpreter, and return its folder."""
    data = FOLDER / "dialogs.jsonl"
    if not data.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        rows = tool_rows(interpreter_dialogs(0), N_LESSONS) + tool_rows(tool_dialogs(3), N_OTHER_TOOLS)
        write_atomically(data, "".join(rows))
    options = TuneOptions(
        model=str(start), data=(str(data),), out=str(FOLDER / "run"), tokens=LESSON_TOKENS, method="full",
        lr=TOOL_LR, replay=tuple(str(DATA / name) for name in REPLAY), replay_share=0.25,
    )  # fmt: skip
    open_run(options)
    return tune(options, Data(), on_step=printed).folder


@contextmanager
def served(model: Path) -> Iterator[str]:
    """Serve a model with the code interpreter, and yield the address."""
    tokenizer = checkpoint.load_tokenizer(model)
    assert tokenizer is not None
    loop = EngineLoop(Engine(checkpoint.load_model(model), tokenizer, max_batch=8))
    entry = ServedModel("SmolLM2", loop, tokenizer, 2048, frozenset({"*"}))
    with serving(entry, None, ServerTools(["python"])) as url:
        yield url


def questions() -> list[Dialog]:
    """Return held-out dialogs: those that need a program, and small talk at the end."""
    needing = (dialog for dialog in interpreter_dialogs(SEED, "test", NEEDS_CODE) if dialog.call)
    talk = interpreter_dialogs(SEED, "test", ["chat"])
    return [*islice(needing, N_QUESTIONS), *islice(talk, N_SMALL_TALK)]


def answers(model: Path) -> list[dict[str, Any]]:
    """Ask all questions, and return the message of each answer and whether it is right."""
    with served(model) as url, ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda dialog: answer(url, dialog), questions()))


def answer(url: str, dialog: Dialog) -> dict[str, Any]:
    """Ask a dialog's question, and return the message of the answer and whether it is right."""
    asked = [message for message in dialog.prompt if message["role"] != "system"]
    body = {"messages": asked, "tools": [INTERPRETER], "max_tokens": 300, "temperature": 0}
    response = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=600)
    response.raise_for_status()
    message = response.json()["choices"][0]["message"]
    steps = message.get("herd_steps") or []
    produced: list[dict[str, Any]] = []
    for step in steps:
        call = {"name": step["name"], "arguments": json.loads(step["arguments"])}
        produced.append({"role": "assistant", "tool_calls": [call]})
        produced.append({"role": "ipython", "content": step["content"]})
    produced.append({"role": "assistant", "content": message["content"]})
    ran = [(step["name"], step["ok"]) for step in steps]
    as_expected = ran == ([(CODE_INTERPRETER, True)] if dialog.call else [])
    return {"message": message, "right": as_expected and score(dialog, produced).correct}


def on_the_page(model: Path, screens: Path) -> bool:
    """Type a question on the page, and return whether one card and the right answer are visible."""
    dialog = next(dialog for dialog in questions() if dialog.kind == "days_between")
    screens.mkdir(parents=True, exist_ok=True)
    with served(model) as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        good = []
        for name, (width, height, colours) in SCREENS.items():
            page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=colours)
            page.goto(url)
            good.append(typed(page, dialog))
            page.screenshot(path=screens / f"{name}.png")
        browser.close()
    return all(good)


def typed(page: Page, dialog: Dialog) -> bool:
    """Switch the interpreter on, ask a dialog's question, and open the card of its call."""
    page.click(".toolbox summary")
    page.check(".toolbox label:has-text('python') input")
    page.keyboard.press("Escape")
    page.fill("#draft", dialog.prompt[-1]["content"])
    page.press("#draft", "Enter")
    page.wait_for_selector(".answer[aria-busy=false]", timeout=240_000)
    cards = page.locator(".step")
    if cards.count() != 1:
        return False
    page.click(".step summary")
    program, output = (page.locator(".step pre").nth(index).inner_text() for index in (0, 1))
    text = page.locator(".answer .text").inner_text()
    print(program, output, text, sep="\n", flush=True)
    return "print(" in program and dialog.result in output and dialog.answer in text


def main() -> None:
    parser = bench_parser(__doc__)
    parser.add_argument("--start", type=Path, default=START, help="the model that calls other tools")
    parser.add_argument("--screens", type=Path, default=FOLDER / "screens", help="where screenshots go")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if not args.start.exists():
        sys.exit(f"{args.start}: not there; make it with bench/tune.py tools --work {WORK / 'tune400k'}")
    taught = teach(args.start)
    values: dict[str, Value | tuple[Any, str]] = {}
    for name, model in (("before", args.start), ("after", taught)):
        found = kept(FOLDER / f"answers-{name}.json", lambda model=model: answers(model))
        for part, rows in (("questions", found[:N_QUESTIONS]), ("small talk", found[N_QUESTIONS:])):
            right = share(part, [row["right"] for row in rows])
            bar, passed = (">= 0.9", right.value >= 0.9) if name == "after" else (None, None)
            values[f"{part} {name}: right"] = Value(
                right.value, f"of {len(rows)}", right.lo, right.hi, bar=bar, passed=passed
            )
        silent = sum(not row["message"].get("herd_steps") for row in found[N_QUESTIONS:])
        values[f"small talk {name}: without a call"] = (silent, f"of {N_SMALL_TALK}")
    shown = on_the_page(taught, args.screens)
    values["on the page: one call, its output and the right answer"] = Value(
        shown, "yes", bar="yes", passed=shown
    )
    save_receipt(
        "serve-interpreter", values=values, seed=SEED,
        what="SmolLM2-135M taught the code interpreter of herd serve",
        notes=f"{LESSON_TOKENS:,} tokens of {N_LESSONS} dialogs with the interpreter, {N_OTHER_TOOLS} with other tools, "
        f"and 25 % replay; the start is the model of tune-tools",
    )  # fmt: skip


if __name__ == "__main__":
    main()
