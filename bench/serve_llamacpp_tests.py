"""Run the tests of llama.cpp's own server against `herd serve`, unchanged.

    python bench/serve_llamacpp_tests.py [--source UNPACKED] [--only NAME]

The tests are in the source package of llama-cpp-python, which `make rivals` builds. They start a program in place of
`llama-server` (`llama_server_shim.py`), and their model is stories260K, from the real test data. Every test that is not
listed in `serve_llamacpp_skips.yaml` must pass. A test is listed if it is about something that Herd does not have or
does otherwise on purpose, with the reason.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from common import DATA, WORK, at_least, bench_parser, exactly, save_receipt
from herd.report import Value
from llama_server_shim import SHIM
from suites import pip_install, run_tests, source_package

SKIPS = Path(__file__).with_name("serve_llamacpp_skips.yaml")
PLUGIN = """
import json, os, re

def pytest_collection_modifyitems(config, items):
    skips = [re.compile(pattern) for pattern in json.loads(os.environ["HERD_SKIPS"])]
    left_out = [item for item in items if any(skip.search(item.nodeid) for skip in skips)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]
"""
MIN_FUNCTIONS = 90


def main() -> None:
    """Run the tests and write a receipt."""
    parser = bench_parser(__doc__)
    parser.add_argument("--source", type=Path, help="the unpacked source package (default: PyPI's)")
    parser.add_argument("--only", default="", help="run only tests named so, without a receipt")
    args = parser.parse_args()
    skips: dict[str, str] = yaml.safe_load(SKIPS.read_text(encoding="utf-8"))
    source = llamacpp_tests(args.source)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tests = folder / "tools" / "server" / "tests"
        shutil.copytree(source, tests)
        shutil.copytree(source.parents[2] / "models" / "templates", folder / "models" / "templates")
        functions = test_functions(tests / "unit")
        with forking_server(folder) as environment:
            outcomes = run(tests, environment, list(skips), args.only)
    failed = {test: problem for test, problem in outcomes.items() if problem is not None}
    for test, problem in failed.items():
        print(f"FAILED {test}: {problem}")
    ran = {test.partition("[")[0] for test in outcomes}
    reasons = Counter(
        next(
            (why for pattern, why in skips.items() if re.search(pattern, function)), "only some of its cases"
        )
        for function in functions - ran
    )
    for reason, count in reasons.most_common():
        print(f"{count} functions not run: {reason}")
    if args.only:
        sys.exit(bool(failed))
    save_receipt(
        "serve-llamacpp-tests",
        what="llama.cpp's own server tests, unchanged, against `herd serve` behind a shim, with stories260K",
        values={
            "functions": Value(len(functions), "test functions"),
            "run": at_least(MIN_FUNCTIONS, len(ran), "functions"),
            "cases": Value(len(outcomes), "cases run"),
            "failed": exactly(0, len(failed), "cases"),
        },
        notes="; ".join(f"{count} functions: {reason}" for reason, count in reasons.most_common()),
    )
    sys.exit(bool(failed))


def test_functions(unit: Path) -> set[str]:
    """Return all test functions as pytest names them, without parameters."""
    return {
        f"unit/{path.name}::{node.name}"
        for path in unit.glob("test_*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test")
    }


@contextmanager
def forking_server(folder: Path) -> Iterator[dict[str, str]]:
    """Start the process that forks servers, and yield the environment in which tests find it."""
    place, program, site = folder / "socket", folder / "llama-server", folder / "site"
    program.write_text(SHIM, encoding="utf-8")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    site.mkdir()
    (site / "herd_skips.py").write_text(PLUGIN, encoding="utf-8")
    pip_install(site, "wget")
    shim = Path(__file__).with_name("llama_server_shim.py")
    command = [sys.executable, str(shim), str(place), str(DATA / "stories260K")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as forker:
        assert forker.stdout is not None
        if forker.stdout.readline() != "ready\n":
            sys.exit("the shim did not start")
        paths = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])
        yield os.environ | {
            "LLAMA_SERVER_BIN_PATH": str(program),
            "HERD_SHIM": str(place),
            "PYTHONPATH": paths,
        }
        forker.terminate()


def run(tests: Path, environment: dict[str, str], skips: list[str], only: str) -> dict[str, str | None]:
    """Run the tests that are not skipped. Return the problem of each, None for those that passed."""
    words = ["-n", "0", "-p", "no:cacheprovider", "-p", "herd_skips", "--tb=short"]
    words += ["unit", *(["-k", only] if only else [])]
    out: dict[str, str | None] = {}
    for case, problem in run_tests(tests, words, environment | {"HERD_SKIPS": json.dumps(skips)}):
        said = None if problem is None else problem.get("message") or "error"
        out[f"{case.get('file')}::{case.get('name')}"] = said and " ".join(said.split())[:200]
    return out


def llamacpp_tests(source: Path | None) -> Path:
    """Return the folder of llama.cpp's server tests in llama-cpp-python's source package, fetched if it is None."""
    source = source or source_package("llama_cpp_python", "0.3.36", WORK / "llamacpp-tests")
    return source / "vendor" / "llama.cpp" / "tools" / "server" / "tests"


if __name__ == "__main__":
    main()
