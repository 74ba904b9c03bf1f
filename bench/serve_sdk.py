"""Run the tests of OpenAI's and Anthropic's Python packages against `herd serve`, with its own strict validation of responses.

    python bench/serve_sdk.py

The source package is fetched from PyPI, with what its tests import, into ~/.cache/herd/bench. The server has a tiny
random model under any name. Every test must pass, except the ones listed in `ALLOWED`. Those must fail with the words
given there: a request for something that Herd refuses must be refused by name.

``--gateway``: the same tests ask `herd serve --upstream` with keys before that server, which has keys too. The key in the
tests' conftest.py is replaced by a real one. Every answer that the gateway has billed must have been billed by the
server behind it, with the same tokens.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import WORK, bench_parser, save_receipt
from herd.report import Value
from herd.serve.store import Store
from servers import gateway, ledger_rows, new_key, serving

PACKAGES = ("respx", "dirty-equals", "inline-snapshot", "time-machine", "nest-asyncio", "httpx-aiohttp",
            "executing", "asttokens", "pytest-asyncio", "aiohttp", "http-snapshot")  # fmt: skip
"""What the SDKs' tests import."""


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


def main() -> None:
    """Run every suite and write a receipt."""
    parser = bench_parser(__doc__)
    parser.add_argument("--gateway", action="store_true", help="ask through herd serve --upstream")
    args = parser.parse_args()
    with servers(args.gateway) as (url, key, bills):
        failures = {test: failure for suite in SUITES for test, failure in run_suite(suite, url, key).items()}
        values = bills()
    reasons: Counter[str] = Counter()
    surprises: list[str] = []
    for test, failure in failures.items():
        if failure is None:
            continue
        allowed = next((a for a in ALLOWED if re.search(a.tests, test)), None)
        if allowed is not None and allowed.words in failure:
            reasons[allowed.reason] += 1
        else:
            surprises.append(f"{test}: {failure.strip().splitlines()[-1][:200]}")
    for surprise in surprises:
        print(surprise)
    for reason, count in reasons.items():
        print(f"{count} listed: {reason}")
    through = "`herd serve --upstream` before one" if args.gateway else "`herd serve`"
    save_receipt(
        "serve-gateway-sdk" if args.gateway else "serve-sdk",
        commit=args.commit,
        what=f"The SDKs' own tests with strict validation, against {through} with a tiny random model",
        values={
            "passed": Value(sum(failure is None for failure in failures.values()), "tests"),
            "listed": Value(reasons.total(), "tests refused as they must be"),
            "failed": Value(len(surprises), "tests", bar="= 0", passed=not surprises),
            **values,
        },
        notes="; ".join(f"{count}: {reason}" for reason, count in reasons.items()),
    )
    sys.exit(bool(surprises))


@contextmanager
def servers(with_gateway: bool) -> Iterator[tuple[str, str, Callable[[], dict[str, Value]]]]:
    """Serve a tiny random model under any name. Yield the address, a key, and a function that compares the bills."""
    if not with_gateway:
        with serving(tiny_model()) as url:
            yield url, "any", dict
        return
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        stores = [Store(Path(folder) / name) for name in ("serve.db", "behind.db")]
        behind = stack.enter_context(serving(tiny_model(), stores[1]))
        url = stack.enter_context(gateway(f"{folder}/serve.db", behind, key=new_key(stores[1], "gateway")))
        yield url, new_key(stores[0], "sdk"), lambda: compare(*stores)
        for store in stores:
            store.close()


def compare(store: Store, behind: Store) -> dict[str, Value]:
    """Compare the bills of a gateway with those of the server behind it. A client that has left may have less."""
    time.sleep(1)  # for the last requests to be settled
    ours, theirs = (
        Counter(
            (row.prompt_tokens, row.completion_tokens)
            for row in ledger_rows(each)
            if row.status == "completed"
        )
        for each in (store, behind)
    )
    n_without, left = (ours - theirs).total(), sum(row.reserved_tokens for row in ledger_rows(store))
    return {
        "billed": Value(ours.total(), "answers"),
        "tokens_billed": Value(sum(sum(tokens) * n for tokens, n in ours.items()), "tokens"),
        "billed_otherwise_behind": Value(n_without, "answers", bar="= 0", passed=n_without == 0),
        "still_reserved": Value(left, "tokens", bar="= 0", passed=left == 0),
    }


def run_suite(suite: SdkSuite, url: str, key: str) -> dict[str, str | None]:
    """Run a suite's tests and return each test's failure, or None for those that passed."""
    source, site = fetch(suite)
    conftest = source / "tests" / "conftest.py"
    conftest.write_text(re.sub(r"(?m)^api_key = .*$", f"api_key = {key!r}", conftest.read_text()))
    report = source / "herd-report.xml"
    paths = os.pathsep.join([str(source / "src"), str(site)])
    environment = os.environ | {"PYTHONPATH": paths, "TEST_API_BASE_URL": f"{url}{suite.path}"}
    words = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-o", "junit_family=xunit1"]
    words += [f"--junitxml={report}", *suite.files]
    subprocess.run(words, cwd=source, env=environment, stdout=subprocess.DEVNULL, check=False)
    out: dict[str, str | None] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        problem = case.find("failure")
        problem = case.find("error") if problem is None else problem
        if case.find("skipped") is None:
            name = f"{case.get('file')}::{case.get('classname')}::{case.get('name')}"
            out[name] = None if problem is None else problem.text or ""
    if not out:
        sys.exit(f"no test of {suite.package} was run: see {report}")
    return out


def fetch(suite: SdkSuite) -> tuple[Path, Path]:
    """Return the folders of the source package and of the packages that its tests import."""
    folder = WORK / "sdk"
    source, site = folder / f"{suite.package}-{suite.version}", folder / "site"
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    if not site.exists():
        subprocess.run([*pip, "install", "--no-deps", "--target", str(site), *PACKAGES], check=True)
    if not source.exists():
        wanted = f"{suite.package}=={suite.version}"
        download = ["download", "--no-deps", "--no-binary", ":all:", wanted, "-d", str(folder)]
        subprocess.run([*pip, *download], check=True)
        with tarfile.open(next(folder.glob(f"{suite.package}-{suite.version}.tar.gz"))) as archive:
            archive.extractall(folder, filter="data")
    return source, site


def tiny_model() -> Any:
    """Return a tiny random model that is served under any name."""
    from herd.engine.engine import Engine
    from herd.engine.loop import EngineLoop
    from herd.llama import ModelConfig
    from herd.llama.model import LlamaLM
    from herd.serve.chat import ServedModel
    from herd.text import Tokenizer

    tokenizer = Tokenizer.train(["six times seven is forty-two, calculator expression parameters"] * 3, 540)
    config = ModelConfig(540, 48, 2, 6, 2, 80, rope_theta=10_000.0, max_context=4096)
    loop = EngineLoop(Engine(LlamaLM(config).init_weights(0), tokenizer))  # any token is as likely as another
    return ServedModel("tiny", loop, tokenizer, 4096, frozenset("*"))


if __name__ == "__main__":
    main()
