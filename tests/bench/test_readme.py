"""The generated tables and pictures of the README: idempotent, and up to date with the committed receipts."""

import json
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from example_run import make

import readme
import readme_checks
import readme_tables
from family_bars import judged
from herd.errors import ReportError
from herd.report import Value, read_receipts, write_receipt
from herd.report.receipt import Receipt
from herd.report.run import load_run
from readme_checks import checks_table, missed_text, rows
from readme_picture import write_pictures
from readme_tables import (
    Number,
    family_table,
    fill,
    mark,
    marks_text,
    measured_on,
    numbers_table,
    plan_table,
    run_values,
    shown,
    stages_table,
)

ROOT = Path(__file__).parents[2]


def test_the_committed_tables_are_up_to_date():
    done = subprocess.run(
        [sys.executable, "bench/readme.py", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    if "skipped" in done.stderr:
        pytest.skip(done.stderr.strip())


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """Return the hashes of a checkout's three commits, the last of which was rewritten. The bench looks at it."""

    def run(*words):
        done = subprocess.run(
            ["git", "-c", "user.name=t", "-c", "user.email=t@t", *words],
            cwd=tmp_path,
            check=True,
            capture_output=True,
        )
        return done.stdout.decode().strip()

    run("init", "-q")
    hashes = []
    for words in (["-m", "one"], ["-m", "two"], ["-m", "three", "--amend"]):
        run("commit", "-q", "--allow-empty", *words)
        hashes.append(run("rev-parse", "HEAD"))
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    return hashes


def test_receipts_of_lost_commits_and_of_uncommitted_changes_are_marked(checkout):
    one, two, three = checkout
    commits = readme.history()
    assert commits == {one, three}

    def of(hash_, dirty):
        return mark(Receipt("r", "r", {}, "r", "2026-01-01", {"hash": hash_, "dirty": dirty}), commits)

    assert [of(one, False), of(three, True), of(two, False), of(two, True), of(None, None)] == [
        "",
        "‡",
        "†",
        "†‡",
        "†",
    ]
    text = marks_text({"a": "", "b": "‡", "c": "†", "d": "†‡"})
    assert "history: 2 of 4 records." in text
    assert "changes: 2 of 4." in text


@pytest.mark.parametrize("shallow", [True, False])
def test_without_the_history_the_check_is_skipped_and_writing_refused(
    checkout, tmp_path, monkeypatch, capsys, shallow
):
    copy = tmp_path / "copy"
    if shallow:
        subprocess.run(["git", "clone", "-q", "--depth", "1", f"file://{tmp_path}", str(copy)], check=True)
    else:
        copy.mkdir()
        monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    monkeypatch.setattr(readme, "ROOT", copy)
    assert (readme.main(["--check"]), readme.main([])) == (0, 1)
    assert "skipped: git does not have the whole history" in capsys.readouterr().err


def test_the_links_of_the_readme_exist():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#]+)\)|(?:src|srcset)=\"([^\"]+)\"", readme)
    for target in (a or b for a, b in targets):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), f"README points at {target}"


def test_fill_replaces_only_between_markers_and_is_idempotent():
    text = "a\n<!-- herd:table x -->\nold\n<!-- herd:end -->\nb\n<!-- herd:table y -->\n<!-- herd:end -->\n"
    filled = fill(text, {"x": "new", "y": "| t |"})
    assert (
        filled
        == "a\n<!-- herd:table x -->\nnew\n<!-- herd:end -->\nb\n<!-- herd:table y -->\n| t |\n<!-- herd:end -->\n"
    )
    assert fill(filled, {"x": "new", "y": "| t |"}) == filled


@pytest.mark.parametrize(
    "text, word",
    [
        ("<!-- herd:table z -->\n<!-- herd:end -->", "'z'"),
        ("<!-- herd:table x -->\nnever closed", "not closed"),
    ],
)
def test_markers_that_cannot_be_filled_are_refused(text, word):
    with pytest.raises(ReportError, match=word):
        fill(text, {"x": ""})


def test_checks_show_bars_and_verdicts(tmp_path):
    values = {
        "speed": Value(1.31, "1", lo=1.28, hi=1.33, bar="≥ 1.15", passed=True),
        "memory of Q4_K_M": Value(0.95, "1", bar="<= 0.9", passed=False),
        "share_of_all": Value(0.735, "fraction", bar="≥ 0.7", passed=True),
        "small talk": Value(0.75, "of 20", lo=0.531, hi=0.888, bar=">= 0.9", passed=False),
        "unjudged": Value(3, "s"),
    }
    path = write_receipt(tmp_path / "pace.json", what="training", values=values, command="true")
    record = json.loads(path.read_text()) | {"date": "2026-01-31T12:00:00Z"}
    record["machine"] |= {"cpu": "Intel(R) Xeon(R) Processor @ 2.50GHz", "instruction_set": "AVX2"}
    path.write_text(json.dumps(record))
    receipts = read_receipts(tmp_path)
    table = checks_table(receipts, {"pace": "†"}).replace("\xa0", " ")
    head = "| **training** ([receipt](bench/receipts/pace.json), 2026-01-31, Intel Xeon, AVX2) † |  |  |  |"
    missed = [
        "| memory of Q4_K_M | 0.950 | ≤ 0.9 | **✗** |",
        "| small talk | 75.0 % of 20 (53.1 – 88.8) | ≥ 90 % | **✗** |",
    ]
    assert table.splitlines()[2:] == [
        head,
        "| speed | 1.31 (1.28 – 1.33) | ≥ 1.15 | ✓ |",
        missed[0],
        "| share of all | 73.5 % | ≥ 70 % | ✓ |",
        missed[1],
    ]
    only = checks_table(receipts, {"pace": "†"}, missed=True).replace("\xa0", " ")
    assert only.splitlines()[2:] == [head, *missed]
    assert missed_text(receipts).startswith("2 of 4 bars")


def test_equal_rows_that_passed_share_a_line(tmp_path):
    def of(found, passed=True):
        return Value(found, "files", bar="0", passed=passed)

    values = {"a": of(0), "b": of(1, False), "c": of(0), "d": of(0), "e": of(0), "f": of(1, False)}
    values |= {"g": of(1, False), "h": of(1, False)}
    write_receipt(tmp_path / "left.json", what="files left", values=values, command="true")
    table = rows(read_receipts(tmp_path)["left"])
    assert [row.label for row in table] == ["a; c; d; e", "b", "f", "g", "h"]


def test_gold_answers_are_summed_and_a_miss_is_not(tmp_path):
    values = {
        f"{name}_{form}_gold": Value(n, "items", bar=bar, passed=True)
        for name, n, bar in (
            ("human_eval", 164, "164 of 164"),
            ("ifeval", 536, "536 of 541, 5 contradict themselves"),
        )
        for form in ("base", "instruct")
    }
    values["mbpp_base_gold"] = Value(499, "items", bar="500 of 500", passed=False)
    values["mbpp_base_wrong"] = Value(0, "items", bar="0", passed=True)
    write_receipt(tmp_path / "eval_gold.json", what="judges", values=values, command="true")
    found = rows(read_receipts(tmp_path)["eval_gold"])
    assert [(row.number.replace("\xa0", " "), row.bar, row.passed) for row in found] == [
        ("1,400 items", "1,400 of 1,410; the others contradict themselves", True),
        ("0 items", "0", True),
        ("499 items", "500 of 500", False),
    ]
    assert found[0].label.endswith(": human eval, ifeval, mbpp")


def test_labels_that_replace_keys_belong_to_committed_receipts():
    receipts = read_receipts(ROOT / "bench" / "receipts")
    for start, pattern, _ in readme_checks.LABELS:
        keys = [key for name, receipt in receipts.items() if name.startswith(start) for key in receipt.values]
        assert any(re.fullmatch(pattern, key) for key in keys), (start, pattern)


def test_the_families_are_judged_by_the_bars_that_were_set_before_they_were_measured():
    assert judged("tools_worst_language", 0.479, 0.458, 0.5) == Value(
        0.479, "fraction", 0.458, 0.5, "≥ 0.5", False
    )
    assert judged("tools_worst_form", 0.703, 0.686, 0.718).passed
    assert not judged("tools_worst_form", 0.703, 0.59, 0.718).passed, "one run is too far below"
    assert judged("tools_th", 0.53, 0.46, 0.58).bar is None
    again = readme.judged_again(read_receipts(ROOT / "bench" / "receipts")["family"]).values
    assert [key for key, value in again.items() if key.startswith("tools_") and value.bar] == [
        "tools_en",
        "tools_worst_language",
        "tools_worst_form",
    ]
    assert again["student_minus_control_tools"].bar == "ahead in every run"


def test_the_numbers_of_the_readme_name_part_older_processor_and_miss(monkeypatch, tmp_path):
    numbers = (
        Number("pace of a step", "pace", "ratio"),
        Number("start", "start", "first", part=("`import torch`", "torch")),
    )
    monkeypatch.setattr(readme_tables, "NUMBERS", numbers)
    for name, ratio in (("pace", 1.4), ("pace-avx2", 1.1)):
        values = {"ratio": Value(ratio, "×", bar="≥ 1.2", passed=ratio >= 1.2)}
        write_receipt(tmp_path / f"{name}.json", what="pace", values=values, command="true")
    values = {"first": (3.24, "s"), "torch": (2.62, "s")}
    write_receipt(tmp_path / "start.json", what="start", values=values, command="true")
    receipts = read_receipts(tmp_path)
    table = numbers_table(receipts, {"pace": "", "pace-avx2": "‡", "start": "†"}).replace("\xa0", " ")
    on = measured_on(receipts["pace"])
    assert table.splitlines()[2:] == [
        "| [pace of a step](bench/receipts/pace.json) | 1.40 ×<br>[AVX2](bench/receipts/pace-avx2.json): 1.10 × ‡ "
        f"| ≥ 1.2<br>≥ 1.2 **✗** | {on} |",
        f"| [start](bench/receipts/start.json) † | 3.24 s, of which 2.62 s are `import torch` | – | {on} |",
    ]


def test_the_numbers_of_the_readme_were_measured_on_what_it_says():
    receipts = read_receipts(ROOT / "bench" / "receipts")
    for name in {number.receipt for number in readme_tables.NUMBERS}:
        machine = receipts[name].machine
        assert (machine["cores"], "avx512_vnni" in machine["isa"]) == (2, True), name
        assert measured_on(receipts[name]).endswith((", Intel Xeon", ", AMD EPYC")), name


def test_the_minutes_of_the_demo_are_those_of_the_receipts():
    receipts = read_receipts(ROOT / "bench" / "receipts")
    quick = sum(
        value.value for key, value in receipts["raise-demo"].values.items() if key.endswith("/seconds")
    )
    slow = receipts["family"].values["seconds"].hi
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"family of small models: {quick / 60:.0f} to {slow / 60:.0f} minutes on two cores" in readme


def test_a_number_of_the_readme_without_a_receipt_is_an_error():
    with pytest.raises(ReportError, match="'speed-q80' has no value 'decode at 128: ratio'"):
        numbers_table({}, {})


def test_the_plan_table_compares_predictions_with_reality(tmp_path):
    meta = {
        "MFU 1: TP8 × CP1 × PP16 × DP64, 8,192": (49.0, "%"),
        "MFU 1, published": (43.0, "%"),
        "MFU 1 error of a constant 0.5": (16.3, "%"),
        "405B GPU hours": (26_570_000, "GPU hours"),
        "405B GPU hours, published": (30_840_000, "GPU hours"),
        "405B GPU hours of a constant 0.5": (22_400_000, "GPU hours"),
    }
    fitted = {
        "one: error": (4.0, "%"),
        "two: error": (-8.0, "%"),
        "three: error": (5.0, "%"),
        "median error, nothing fitted": (30.0, "%"),
    }
    here = {
        "configurations": (1, "1"),
        "chat/decode time error": (0.1, "fraction"),
        "time, worst error": (0.1, "1"),
    }
    for name, values in (("plan-meta", meta), ("plan-gptfast", fitted), ("plan-here", here)):
        write_receipt(tmp_path / f"{name}.json", what=name, values=values, command="true")
    table = plan_table(read_receipts(tmp_path))
    assert "context 8,192: MFU | 43 % | 49.0 % | +14.0 % | constant 50 %: +16.3 % |" in table
    assert "| Llama 3.1 405B: GPU hours | 30.84 M | 26.57 M | −13.8 % | constant 50 %: −27.4 % |" in table
    assert "| median 5.0 %, worst 8.0 % | nothing fitted: median 30.0 % |" in table
    assert (
        "| this machine, 1 configurations: time | – | – | median 10.0 %, worst 10.0 % | profile re" in table
    )
    assert plan_table({}) == "*Not measured yet.*"


@pytest.mark.parametrize(
    "value, text",
    [
        (Value(5.4e-05, "logit"), "5.4e−05 logit"),
        (Value(811_706_777_600, "bytes"), "812 GB"),
        (Value(0.874, "fraction"), "87.4 %"),
        (Value(True, "1"), "yes"),
        (Value(1234567, "tokens"), "1,234,567 tokens"),
        (Value(0.0, "logit"), "0 logit"),
    ],
)
def test_values_are_shown_with_their_units(value, text):
    assert shown(value).replace("\u00a0", " ") == text


def test_a_run_becomes_a_receipt_and_tables(tmp_path):
    run = load_run(make(tmp_path / "demo"))
    write_receipt(
        tmp_path / "raise-full.json", what="a herd", values=run_values(run), command="herd raise --full"
    )
    receipt = read_receipts(tmp_path)["raise-full"]
    family = family_table(receipt).replace("\u00a0", " ")
    assert "| **teacher** | 8.39 M | 1.412<br><sub>1.398 – 1.426</sub> |" in family
    assert family.count("\n") == 6
    stages = stages_table(receipt).replace("\u00a0", " ")
    assert "| teacher | 2 min 12 s |" in stages
    assert all(len({line.count("|") for line in table.splitlines()}) == 1 for table in (family, stages))
    assert family_table(None) == stages_table(None) == "*Not measured yet.*"


def test_pictures_have_their_own_colours_and_namespace(tmp_path):
    run = load_run(make(tmp_path / "demo"))
    for path in write_pictures(run, tmp_path / "img"):
        text = path.read_text(encoding="utf-8")
        root = ElementTree.fromstring(text)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert "var(" not in text, "a colour is not written out"
        assert "A herd raised in" in text
        assert float(root.attrib["height"]) > 600
    young = tmp_path / "young"
    young.mkdir()
    (young / "run.json").write_text("{}")
    for path in write_pictures(load_run(young), tmp_path / "img2"):
        ElementTree.fromstring(path.read_text(encoding="utf-8"))
