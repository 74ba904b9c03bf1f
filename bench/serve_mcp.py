"""Test the tools that `herd serve` runs: as a client of MCP, and against hostile MCP servers.

    python bench/serve_mcp.py conformance [--commit]
    python bench/serve_mcp.py hostile [--source UNPACKED] [--commit]

Both go the whole way: a client asks the server, the model (random, forced to a script) calls the tools, the server
runs them and asks the model again. `conformance` is the MCP project's own test program for clients, from npm.
`hostile` takes the six servers with which llama.cpp tests its own, from the source package of llama-cpp-python: the
server must live, the bill must be exact, and no process may be left. Needs Meta's tokenizer in HERD_TEST_DATA.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx
import sqlalchemy as sql
import torch

from common import DATA, WORK, add_commit, save_receipt
from herd.report.receipt import Value
from herd.serve.chat import ServedModel
from herd.serve.keys import KeyPolicy, create_key
from herd.serve.server_tools import ServerTools
from herd.serve.store import Store
from herd.serve.tables import requests
from herd.text import Tokenizer
from herd.tools.mcp_servers import McpServers, ServerEntry
from serve_agents import CONTEXT, ScriptedLoop, calls_text, serving
from serve_llamacpp_tests import fetch

FOLDER = WORK / "mcp-conformance"
PACKAGES = ("@modelcontextprotocol/conformance@0.1.16", "bun@1.4.5")
SCENARIOS = ("initialize", "tools_call", "sse-retry")
QUESTION = [{"role": "user", "content": "Use the tools."}]
CALL_SECONDS = 3.0
FIXTURES = {
    "echo": ("echo", {"message": "hi"}, "hi"),
    "slow": ("sleep", {"seconds": 30}, "did not answer within"),
    "crash": ("crash", {}, ""),
    "burst": ("echo", {"message": "hi"}, "echo: hi"),
    "malformed": ("echo", {"message": "hi"}, "echo: hi"),
    "grandchild": ("echo", {"message": "hi"}, "echo: hi"),
}
"""The tool that is called of each server, its arguments, and what its result must contain."""


class CallingLoop(ScriptedLoop):
    """An engine loop that calls each of ``calls`` once, in one step after another, and then says DONE."""

    def answer_to(self, text: str) -> str:
        done = len(self.script.answers)
        return calls_text(self.calls[done : done + 1]) if done < len(self.calls) else "DONE"


def ask_with_tools(
    entries: dict[str, ServerEntry], calls: list[tuple[str, dict[str, Any]]] | None = None
) -> dict[str, Any]:
    """Serve the tools of MCP servers, let a client ask a question with all of them, and return what came of it.

    ``calls`` None: each tool is called once, with arguments that fit its schema.
    """
    torch.set_num_threads(1)
    tokenizer = Tokenizer.from_file(DATA / "llama3_tokenizer" / "tokenizer.model")
    before = set(descendants())
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        loop = CallingLoop(tokenizer)
        servers = stack.enter_context(McpServers(entries, call_seconds=CALL_SECONDS))
        tools = ServerTools([], servers)
        loop.calls = calls or [
            (tool.name, arguments(tool.parameters or {})) for group in tools.groups.values() for tool in group
        ]
        store = stack.enter_context(opened(folder / "serve.db"))
        _, token = create_key(store, "bench", KeyPolicy(tools=frozenset(entries)), actor="bench")
        served = ServedModel("tiny", loop, tokenizer, CONTEXT, frozenset({"*"}))
        url = stack.enter_context(serving(served, store, tools))
        asked = [{"type": "mcp", "server_label": name} for name in entries]
        answer = httpx.post(
            f"{url}/v1/chat/completions", headers={"authorization": f"Bearer {token}"}, timeout=120,
            json={"messages": QUESTION, "tools": asked},
        )  # fmt: skip
        health = httpx.get(f"{url}/health", timeout=10).status_code
        with store.read() as connection:
            rows = connection.execute(sql.select(requests)).all()
    message = answer.json()["choices"][0]["message"]
    script = loop.script
    return {
        "content": message["content"],
        "results": [step["content"] for step in message.get("herd_steps", ())],
        "lives": health == 200,
        "billed": (sum(row.prompt_tokens for row in rows), sum(row.completion_tokens for row in rows)),
        "generated": (
            sum(len(generation.request.prompt_ids) for generation in script.generations),
            sum(map(len, script.answers)),
        ),
        "left": sorted(set(descendants()) - before),
    }


class opened:
    """A context with a store in a file."""

    def __init__(self, path: Path) -> None:
        self._store = Store(path)

    def __enter__(self) -> Store:
        return self._store

    def __exit__(self, *_: object) -> None:
        self._store.close()


def arguments(schema: dict[str, Any]) -> dict[str, Any]:
    """Return small arguments that fit a schema."""
    kinds = {"number": 5, "integer": 3, "boolean": True, "array": [], "object": {}}
    return {name: kinds.get(each.get("type"), "x") for name, each in (schema.get("properties") or {}).items()}


def descendants(pid: str = "self") -> list[int]:
    """Return the ids of the processes below one, without those that end by themselves within a second."""
    deadline = time.monotonic() + 1
    while True:
        found = _descendants(pid)
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.05)


def _descendants(pid: str) -> list[int]:
    out = []
    for task in Path(f"/proc/{pid}/task").glob("*"):
        with suppress(FileNotFoundError, ProcessLookupError):  # the thread or the process has just ended
            for child in (task / "children").read_text().split():
                out += [int(child), *_descendants(child)]
    return out


def conformance(args: argparse.Namespace) -> bool:
    """Run the scenarios of the conformance program, each with this file as its client."""
    install()
    values: dict[str, Value] = {}
    for scenario in SCENARIOS:
        words = [sys.executable, str(Path(__file__).resolve()), "client"]
        bun = FOLDER / "node_modules" / ".bin" / "bun"
        program = FOLDER / "node_modules" / "@modelcontextprotocol" / "conformance" / "dist" / "index.js"
        done = subprocess.run(
            [bun, program, "client", "--command", " ".join(words), "--scenario", scenario, "--timeout", "90000"],
            cwd=FOLDER, capture_output=True, text=True, timeout=200,
        )  # fmt: skip
        text = re.sub(r"\x1b\[\d*m", "", done.stdout + done.stderr)
        counts = re.search(r"Passed: (\d+)/(\d+), (\d+) failed", text)
        passed, total = (int(counts[1]), int(counts[2])) if counts else (0, 0)
        good = done.returncode == 0 and 0 < passed == total  # without a check the program says PASSED too
        if not good:
            print(f"--- {scenario}\n{text[-3000:]}\n---", flush=True)
        values[f"{scenario}: checks that pass"] = Value(passed, f"of {total}", bar="all", passed=good)
    save_receipt(
        "serve-mcp-conformance",
        commit=args.commit,
        what="MCP's conformance tests for clients, through herd serve and a scripted model",
        values=values,
    )
    return all(value.passed for value in values.values())


def client(args: argparse.Namespace) -> bool:
    """Be the client of a scenario: connect to its server, and call its tools once."""
    result = ask_with_tools({"it": ServerEntry(url=args.url)})
    print(result)
    return result["content"] == "DONE"


def hostile(args: argparse.Namespace) -> bool:
    """Run the six hostile servers."""
    fixtures = (args.source or fetch()) / "vendor" / "llama.cpp" / "tools" / "server" / "tests" / "fixtures"
    values: dict[str, Value] = {}
    for name, (tool, given, contained) in FIXTURES.items():
        entry = ServerEntry(command=sys.executable, args=[str(fixtures / f"mcp_{name}_server.py")])
        result = ask_with_tools({name: entry}, [(f"{name}_{tool}", given), (f"{name}_{tool}", given)])
        print(name, result, flush=True)
        exact = result["billed"] == result["generated"]
        told = len(result["results"]) == 2 and all(contained in text for text in result["results"])
        good = result["lives"] and result["content"] == "DONE" and exact and told and not result["left"]
        values |= {
            f"{name}: answered, and the server lives": Value(good, "yes", bar="yes", passed=good),
            f"{name}: tokens billed": Value(
                sum(result["billed"]), "tokens", bar=f"= {sum(result['generated'])}", passed=exact
            ),
            f"{name}: processes left": Value(
                len(result["left"]), "processes", bar="= 0", passed=not result["left"]
            ),
        }
    save_receipt(
        "serve-mcp-hostile",
        commit=args.commit,
        what="llama.cpp's six MCP servers for tests, two calls of each, through herd serve and a scripted model",
        values=values,
        notes=f"a call may take {CALL_SECONDS:g} s",
    )
    return all(value.passed for value in values.values())


def install() -> None:
    """Install the conformance program, and bun to run it, if they are not there yet."""
    if (FOLDER / "node_modules" / ".bin" / "bun").exists():
        return
    FOLDER.mkdir(parents=True, exist_ok=True)
    npm = shutil.which("npm") or sys.exit("npm is needed to install the conformance program")
    subprocess.run([npm, "install", "--no-audit", "--no-fund", *PACKAGES], cwd=FOLDER, check=True)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(required=True)
    for verb in (conformance, hostile, client):
        one = verbs.add_parser(verb.__name__, help=(verb.__doc__ or "").partition("\n")[0])
        one.set_defaults(verb=verb)
        add_commit(one)
        if verb is hostile:
            one.add_argument(
                "--source", type=Path, help="the unpacked source package (default: fetched from PyPI)"
            )
        if verb is client:
            one.add_argument("url")
    args = parser.parse_args(words)
    sys.exit(0 if args.verb(args) else 1)


if __name__ == "__main__":
    main()
