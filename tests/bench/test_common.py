"""Benches: measuring changes no committed file unless it is asked to."""

import json
import re
import sys
from pathlib import Path

import pytest

import common
from herd.report import Value, read_receipts

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def folders(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "COMMITTED", tmp_path / "bench" / "receipts")
    monkeypatch.setattr(common, "UNCOMMITTED", tmp_path / "runs" / "receipts")
    monkeypatch.setattr(common, "STARTED_FROM", {"hash": "ab" * 20, "dirty": False})
    return tmp_path


@pytest.mark.parametrize("words, place", [([], "runs"), (["--commit"], "bench")])
def test_a_receipt_goes_to_runs_unless_commit_is_given(folders, monkeypatch, capsys, words, place):
    monkeypatch.setattr(sys, "argv", ["/somewhere/bench/pace.py", "my model", *words])
    values = {"pace": Value(2.5, "tokens/s", bar="≥ 2", passed=True)}
    path = common.save_receipt("pace", what="pace", values=values, seed=3)
    assert path == folders / place / "receipts" / "pace.json"
    assert [p for p in folders.rglob("*") if p.is_file()] == [path]
    receipt = read_receipts(path.parent)["pace"]
    assert (receipt.command, receipt.seed) == ("python bench/pace.py 'my model'", 3)
    assert receipt.commit["hash"] == "ab" * 20, "the commit at the start, not the one at the end"
    assert "pace: 2.5 tokens/s   (≥ 2) passed" in capsys.readouterr().out


@pytest.mark.parametrize(
    "dirty, words, refused", [(True, ["--commit"], True), (True, [], False), (None, ["--commit"], False)]
)
def test_commit_is_refused_with_uncommitted_source_and_only_then(monkeypatch, capsys, dirty, words, refused):
    monkeypatch.setattr(common, "STARTED_FROM", {"hash": None, "dirty": dirty})
    parser = common.bench_parser("What it measures.")
    if not refused:
        assert parser.parse_args(words).commit is bool(words)
        return
    with pytest.raises(SystemExit):
        parser.parse_args(words)
    assert "commit first" in capsys.readouterr().err


def test_every_script_writes_its_receipts_with_the_shared_helper():
    for path in BENCH.glob("*.py"):
        if path.name not in ("common.py", "readme.py"):
            assert "write_receipt" not in path.read_text(encoding="utf-8"), path.name


def test_the_page_of_the_benches_names_every_script():
    page = (BENCH / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(\w+\.py)[ `]", page)) - {"NAME.py"}
    assert named == {path.name for path in BENCH.glob("*.py")}


def test_every_committed_receipt_has_its_file_name():
    for path in (BENCH / "receipts").glob("[!.]*.json"):
        assert json.loads(path.read_text(encoding="utf-8"))["name"] == path.stem
    read_receipts(BENCH / "receipts")


def test_values_are_printed_with_their_verdicts():
    values = {
        "pace": Value(1.234567, "×", bar="≥ 1", passed=True),
        "who": Value("fp32", "name"),
        "left": Value(3, "s"),
    }
    assert common.lines(values).splitlines() == [
        "pace: 1.2346 ×   (≥ 1) passed",
        "who: fp32 name",
        "left: 3 s",
    ]
