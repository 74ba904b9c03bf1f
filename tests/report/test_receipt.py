"""Receipts: they are written completely or not at all, read back unchanged, and need no torch."""

import os
import re
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from herd.errors import ReportError
from herd.report import receipt
from herd.report.receipt import Value, read_receipt, read_receipts, write_receipt


def write(path, **changes):
    return write_receipt(
        path, **({"what": "a test", "values": {"x": (1.0, "s")}, "command": "true"} | changes)
    )


def test_a_receipt_is_read_back_with_date_commit_and_machine(tmp_path):
    values = {
        "speed": Value(980.25, "tokens/s", lo=962.0, hi=995.1, bar="≥ 880", passed=True),
        "memory": (2**31, "bytes"),
    }
    path = write(
        tmp_path / "throughput.json", values=values, seed=7, rivals={"transformers": "5.23.0"}, notes="é"
    )
    back = read_receipts(tmp_path)["throughput"]
    assert path == tmp_path / "throughput.json"
    assert back.values == {"speed": values["speed"], "memory": Value(2**31, "bytes")}
    assert (back.what, back.command, back.seed, back.notes) == ("a test", "true", 7, "é")
    assert back.rivals == {"transformers": "5.23.0"}
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", back.date)
    assert back.machine["cores"] >= 1
    assert back.machine["memory_bytes"] > 1 << 28
    assert back.machine["torch"].startswith("2.")
    assert list(tmp_path.iterdir()) == [path], "no temporary file is left"


@settings(max_examples=20)
@given(st.floats(allow_nan=False, allow_infinity=False), st.text(min_size=1, max_size=20))
def test_any_finite_number_and_any_unit_survive(tmp_path_factory, number, unit):
    path = tmp_path_factory.getbasetemp() / "any.json"
    write(path, values={"x": Value(number, unit)})
    assert read_receipt(path).values["x"] == Value(number, unit)


@pytest.mark.parametrize(
    "values, word",
    [
        ({}, "no values"),
        ({"x": (1.0, "")}, "no unit"),
        ({"x": (float("nan"), "s")}, "finite"),
        ({"x": Value(1.0, "s", lo=float("-inf"))}, "finite"),
    ],
)
def test_bad_values_are_refused_and_the_old_file_stays(tmp_path, values, word):
    path = write(tmp_path / "r.json")
    before = path.read_bytes()
    with pytest.raises(ReportError, match=word):
        write(path, values=values)
    assert path.read_bytes() == before


def test_interrupted_write_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    path = write(tmp_path / "r.json")
    before = path.read_bytes()

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write(path, values={"x": (2.0, "s")})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 1}', '{"schema": 2, "values": {}}'])
def test_a_broken_receipt_is_named(tmp_path, text):
    (tmp_path / "broken.json").write_text(text)
    with pytest.raises(ReportError, match=r"broken\.json"):
        read_receipts(tmp_path)


def test_uncommitted_changes_make_a_receipt_dirty_but_receipts_do_not(tmp_path):
    def git(*words):
        subprocess.run(
            ["git", "-c", "user.name=t", "-c", "user.email=t@t", *words],
            cwd=tmp_path,
            check=True,
            capture_output=True,
        )

    assert receipt.git_commit(tmp_path)["hash"] is None
    git("init")
    (tmp_path / "docs").mkdir()
    for path in (tmp_path / "file", tmp_path / "README.md", tmp_path / "docs" / "checks.md"):
        path.write_text("1")
        git("add", str(path))
    git("commit", "-m", "one")
    assert receipt.git_commit(tmp_path / "not" / "yet")["dirty"] is False
    (tmp_path / "bench" / "receipts").mkdir(parents=True)
    write(tmp_path / "bench" / "receipts" / "r.json")
    assert receipt.git_commit(tmp_path)["dirty"] is False, "a new receipt does not make the tree dirty"
    made_by = {"hash": "ab" * 20, "dirty": False}
    write(tmp_path / "bench" / "receipts" / "earlier.json", made_by=made_by)
    assert read_receipt(tmp_path / "bench" / "receipts" / "earlier.json").commit == made_by
    (tmp_path / "README.md").write_text("2")
    (tmp_path / "docs" / "checks.md").write_text("2")
    assert receipt.git_commit(tmp_path)["dirty"] is False, "tables of receipts do not make the tree dirty"
    (tmp_path / "file").write_text("2")
    assert receipt.git_commit(tmp_path)["dirty"] is True
    assert re.fullmatch(r"[0-9a-f]{40}", receipt.git_commit(tmp_path)["hash"])


@pytest.mark.parametrize(
    "flags, wanted, name",
    [
        ("avx2 fma f16c avx512f avx512bw avx512dq avx512vl avx512_vnni", None, "AVX-512 VNNI"),
        ("avx2 fma f16c avx512f", None, "AVX2"),
        ("sse4_2 avx", None, "portable C++"),
        ("avx2 fma f16c", "reference", "plain torch"),
    ],
)
def test_a_receipt_names_the_instruction_set(monkeypatch, flags, wanted, name):
    monkeypatch.setattr(receipt, "_processor", lambda: ("a processor", set(flags.split())))
    monkeypatch.delenv("HERD_ISA", raising=False)
    if wanted:
        monkeypatch.setenv("HERD_ISA", wanted)
    described = receipt.describe_machine()
    assert (described["cpu"], described["instruction_set"]) == ("a processor", name)


def test_no_torch_is_imported():
    code = "import sys, herd.report.receipt as r; r.describe_machine(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
