"""Run the tests of OpenAI's and Anthropic's Python packages against `herd serve`, with its own strict validation of responses.

    python bench/serve_sdk.py

The source package is fetched from PyPI, with what its tests import, into ~/.cache/herd/bench. The server has a tiny
random model under any name. Every test must pass, except the ones listed in `ALLOWED`. Those must fail with the words
given there: a request for something that Herd refuses must be refused by name. Then Ollama's client and OpenAI's responses
ask for answers (`answering_clients.py`).

``--gateway one`` or ``two``: the same tests ask `herd serve --upstream` with keys before one or two of these servers,
which have keys too. The key in the tests' conftest.py is replaced by a real one. Every answer that the gateway has
billed as complete must have been billed by a server behind it, with the same tokens. A server behind may have more
complete answers only if their clients left the gateway early.

``--gateway vllm``: the server behind is a real vLLM on the CPU, in ~/.cache/herd/bench/vllm, with the same tiny model. A
middleware in it (`vllm_usage.py`) notes the usage that vLLM tells at the end of each answer.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from answering_clients import ask_for_answers
from common import WORK, at_most, bench_parser, exactly, save_receipt
from herd.checkpoint import save_model
from herd.engine.engine import Engine
from herd.engine.loop import EngineLoop
from herd.llama import ModelConfig
from herd.llama.model import LlamaLM
from herd.report import Value
from herd.serve.chat import ServedModel
from herd.serve.store import Store
from herd.text import Tokenizer
from servers import gateway, ledger_rows, new_key, serving, vllm
from suites import pip_install, run_tests, source_package

PACKAGES = ("respx", "dirty-equals", "inline-snapshot", "time-machine", "nest-asyncio", "httpx-aiohttp",
            "executing", "asttokens", "pytest-asyncio", "aiohttp", "http-snapshot")  # fmt: skip
"""What the SDKs' tests import."""
VLLM_TOKENS = 16
"""Longest answer of vLLM, because some tests ask for a thousand tokens."""


@dataclass(frozen=True)
class SdkSuite:
    """The test files of one SDK that Herd's APIs must pass."""

    package: str
    version: str
    files: tuple[str, ...]
    path: str = "/v1"  # of the address that the tests are told


@dataclass(frozen=True)
class Allowed:
    """Tests (a regular expression) that may fail, if their failure contains ``words``, and why."""

    tests: str
    words: str
    reason: str


SUITES = (
    SdkSuite(
        "openai",
        "3.51.0",
        (
            "tests/api_resources/chat/test_completions.py",
            "tests/api_resources/test_completions.py",
            "tests/api_resources/test_models.py",
            "tests/api_resources/test_responses.py",
        ),
    ),
    SdkSuite("anthropic", "2.14.0", ("tests/api_resources/test_messages.py",), path=""),
)
ALLOWED = (
    Allowed(
        r"chat/test_completions.*_create_with_all_params",
        "400 - audio is not supported",
        "sends audio, moderation and prediction: refused, naming the field",
    ),
    Allowed(
        r"/test_completions.*_create_with_all_params",
        "400 - suffix is not supported",
        "sends suffix: refused, naming the field",
    ),
    Allowed(
        r"chat/test_completions.*(retrieve|update|list|delete)",
        "Error code: 40",
        "stored completions: the server stores no answers, so there is nothing at this address",
    ),
    Allowed(
        r"test_responses.*(retrieve|delete|cancel|compact)",
        "Error code: 404",
        "stored responses: the server stores no answers, so there is nothing at this address",
    ),
    Allowed(
        r"test_responses.*_create_with_all_params",
        "400 - background is not supported",
        "asks for an answer in the background: refused, naming the field",
    ),
    Allowed(r"test_responses.*_create", "400 - input", "has no input: refused, naming the field"),
    Allowed(
        r"test_messages.*_create_with_all_params",
        "container is not supported",
        "asks for a container: refused, naming the field",
    ),
    Allowed(
        r"test_messages.*_count_tokens_with_all_params",
        "tools (name).parameters cannot be enforced",
        "has a strict tool with a malformed schema: refused, naming the tool",
    ),
    Allowed(r"test_models.*delete", "Error code: 405", "models are deleted with `herd rm`, not over HTTP"),
)


BEHIND = {
    "one": ("serve-gateway-sdk", "`herd serve --upstream` before one with a tiny random model"),
    "two": ("serve-gateway-sdk-two", "`herd serve --upstream` before two with a tiny random model"),
    "vllm": ("serve-gateway-sdk-vllm", "`herd serve --upstream` before a real vLLM with a tiny random model"),
}
"""The receipt's name and words for what can be behind a gateway."""


def main() -> None:
    """Run every suite and write a receipt."""
    parser = bench_parser(__doc__)
    parser.add_argument("--gateway", choices=BEHIND, default="", help="what is behind herd serve --upstream")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what it has started ends too
    with servers(args.gateway) as (url, key, compare):
        failures = {test: failure for suite in SUITES for test, failure in run_suite(suite, url, key).items()}
        answered = ask_for_answers(url, key)
        values = compare()
    reasons: Counter[str] = Counter()
    surprises: list[str] = []
    for test, failure in failures.items():
        if failure is None:
            continue
        allowed = next((a for a in ALLOWED if re.search(a.tests, test) and a.words in failure), None)
        if allowed is not None:
            reasons[allowed.reason] += 1
        else:
            surprises.append(f"{test}: {failure.strip().splitlines()[-1][:200]}")
    surprises += [f"{call}: {failure}" for call, failure in answered.items() if failure is not None]
    for surprise in surprises:
        print(surprise)
    for reason, count in reasons.items():
        print(f"{count} listed: {reason}")
    name, through = BEHIND.get(args.gateway, ("serve-sdk", "`herd serve` with a tiny random model"))
    save_receipt(
        name,
        what=f"The SDKs' own tests with strict validation, against {through}",
        values={
            "passed": Value(sum(failure is None for failure in failures.values()), "tests"),
            "listed": Value(reasons.total(), "tests refused as they must be"),
            "answered": Value(len(answered), "kinds of calls, whole and streamed"),
            "failed": exactly(0, len(surprises), "tests"),
            **values,
        },
        notes="; ".join(f"{count}: {reason}" for reason, count in reasons.items()),
    )
    sys.exit(bool(surprises))


@contextmanager
def servers(behind: str) -> Iterator[tuple[str, str, Callable[[], dict[str, Value]]]]:
    """Serve a tiny random model under any name. Yield the address, a key, and a function that compares the bills.

    ``behind`` names what is behind a gateway. Empty: there is no gateway.
    """
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        if not behind:
            yield stack.enter_context(serving(tiny_server())), "any", dict
            return
        store, store_behind = Store(Path(folder) / "serve.db"), Store(Path(folder) / "behind.db")
        if behind == "vllm":
            model, tokenizer = tiny_model()
            save_model(Path(folder) / "tiny", model, tokenizer)
            shutil.copy(Path(__file__).with_name("vllm_usage.py"), folder)
            words = ["--override-generation-config", json.dumps({"max_new_tokens": VLLM_TOKENS})]
            words += ["--middleware", "vllm_usage.NotedUsage"]
            urls = [stack.enter_context(vllm(Path(folder) / "tiny", *words, python_path=folder))[0]]
        else:
            count = {"one": 1, "two": 2}[behind]
            urls = [stack.enter_context(serving(tiny_server(), store_behind)) for _ in range(count)]
        key = new_key(store_behind, "gateway")
        url = stack.enter_context(gateway(f"{folder}/serve.db", *urls, key=key))

        def compare() -> dict[str, Value]:
            time.sleep(1)  # for the last requests to be settled
            rows = ledger_rows(store_behind)
            told = told_by_vllm(Path(folder) / "usage.jsonl") if behind == "vllm" else complete(rows)
            values = compared(ledger_rows(store), told)
            if behind == "two":
                each = Counter(row.server for row in rows).values()
                text = " + ".join(map(str, each))
                values["by_server"] = Value(text, "requests", bar="both some", passed=len(each) == 2)
            return values

        yield url, new_key(store, "sdk"), compare
        store.close()
        store_behind.close()


def complete(rows: list[Any]) -> Counter[tuple[int, int]]:
    """Return the tokens of prompt and answer of the answers that a ledger has as complete."""
    return Counter((row.prompt_tokens, row.completion_tokens) for row in rows if row.status == "completed")


def told_by_vllm(notes: Path) -> Counter[tuple[int, int]]:
    """Return the tokens of prompt and answer that vLLM told at the end of each stream."""
    usages = [json.loads(line)["usage"] for line in notes.read_text().splitlines()]
    return Counter((usage["prompt_tokens"], usage["completion_tokens"]) for usage in usages)


def compared(rows: list[Any], behind: Counter[tuple[int, int]]) -> dict[str, Value]:
    """Compare the bills of a gateway with the complete answers of the servers behind it."""
    ours = complete(rows)
    n_left = sum(row.status == "cancelled" for row in rows)
    n_more = (behind - ours).total()
    return {
        "billed": Value(ours.total(), "answers"),
        "tokens_billed": Value(sum(sum(tokens) * n for tokens, n in ours.items()), "tokens"),
        "billed_otherwise_behind": exactly(0, (ours - behind).total(), "answers"),
        "hung_up": Value(n_left, "requests"),
        "complete_only_behind": at_most(n_left, n_more, "answers", shown=f"≤ {n_left}, those hung up"),
        "still_reserved": exactly(0, sum(row.reserved_tokens for row in rows), "tokens"),
    }  # fmt: skip


def run_suite(suite: SdkSuite, url: str, key: str) -> dict[str, str | None]:
    """Run a suite's tests and return each test's failure, or None for those that passed."""
    folder = WORK / "sdk"
    source, site = source_package(suite.package, suite.version, folder), folder / "site"
    if not site.exists():
        pip_install(site, *PACKAGES)
    conftest = source / "tests" / "conftest.py"
    conftest.write_text(re.sub(r"(?m)^api_key = .*$", f"api_key = {key!r}", conftest.read_text()))
    paths = os.pathsep.join([str(source / "src"), str(site)])
    environment = os.environ | {"PYTHONPATH": paths, "TEST_API_BASE_URL": f"{url}{suite.path}"}
    return {
        f"{case.get('file')}::{case.get('classname')}::{case.get('name')}": None
        if problem is None
        else problem.text or ""
        for case, problem in run_tests(source, ["-q", "-n", "2", *suite.files], environment)
    }


def tiny_model() -> tuple[LlamaLM, Tokenizer]:
    """Return a random model, whose heads are as wide as vLLM needs them, and its tokenizer.

    With this seed, answers end after some tens of tokens.
    """
    tokenizer = Tokenizer.train(["six times seven is forty-two, calculator expression parameters"] * 3, 540)
    config = ModelConfig(540, 64, 2, 2, 1, 80, rope_theta=10_000.0, max_context=4096)
    return LlamaLM(config).init_weights(7), tokenizer


def tiny_server() -> ServedModel:
    """Return the tiny model, served under any name."""
    model, tokenizer = tiny_model()
    return ServedModel("tiny", EngineLoop(Engine(model, tokenizer)), tokenizer, 4096, frozenset("*"))


if __name__ == "__main__":
    main()
