"""The page of a run: whole, self-contained, the right numbers in it, and never failing on what is missing or
broken."""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from herd.errors import ReportError
from herd.report import palette
from herd.report.page import build_page
from herd.report.run import load_run

VOID = {"meta", "link", "br", "img", "input", "hr"}


class Checker(HTMLParser):
    """Well-formed nesting, no reference to anything outside, unique ids, anchors that exist."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.anchors: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag, attrs):
        for key, value in attrs:
            assert key not in {"src", "srcset", "xlink:href", "onclick", "onload"}, (
                f"<{tag} {key}> reaches outside"
            )
            if key == "id":
                self.ids.append(value)
            if key == "href":
                assert value.startswith("#"), f"link to {value}"
                self.anchors.append(value[1:])
        assert tag not in {"script", "link", "iframe", "img"}, f"<{tag}> in a self-contained page"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> without a beginning"
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data):
        self.text.append(data)


def checked(folder: Path) -> str:
    """Build the page, check its form, and return what a reader can read, white space joined."""
    html = build_page(folder).read_text(encoding="utf-8")
    checker = Checker()
    checker.feed(html)
    assert not checker.open, f"never closed: {checker.open}"
    assert len(set(checker.ids)) == len(checker.ids)
    assert set(checker.anchors) <= set(checker.ids)
    assert "@import" not in html
    assert not re.search(r"https?://", html), "a self-contained page fetches nothing"
    for number in ("nan", "inf", "None", "Undefined"):
        assert not re.search(rf">\s*[−-]?{number}\b", html), f"{number} is shown"
    return " ".join(" ".join(checker.text).split())


def test_the_page_of_a_complete_run_shows_its_numbers(example):
    text = checked(example).replace("\u00a0", " ")
    assert "A herd raised in 6 min 16 s" in text
    for heading in ("The family", "Training", "Long context", "Languages", "Tools", "Sample texts", "Costs"):
        assert heading in text
    for number in (
        "1.412",
        "1.398 – 1.426",
        "74.1",
        "−0.072",
        "−0.081 – −0.063",
        "87.0",
        "2 of 3",
        "398 TFLOP",
    ):
        assert number in text, number
    assert "English" in text
    assert "Japanese" in text
    assert "seed 42" in text
    assert "herd raise --name demo --seed 42" in text
    assert "way to do this is to use the <b>copy</b> module & friends." in text, (
        "model output is text, not markup"
    )
    assert "stopped at 1,024 tokens" in text
    lineage = json.loads((example / "student" / "herd.json").read_text())["weights_hash"]
    assert lineage in text


def test_the_same_folder_gives_the_same_bytes(example):
    first = build_page(example).read_bytes()
    assert build_page(example).read_bytes() == first


def test_the_tree_follows_the_hashes(example):
    page = build_page(example).read_text()
    told = re.search(r'aria-label="(Family tree: [^"]+)"', page).group(1)
    assert "long 8.4 M, parent of (instruct 8.4 M, parent of (student 3.8 M))" in told
    lineage = json.loads((example / "student" / "herd.json").read_text())
    teacher = json.loads((example / "teacher" / "herd.json").read_text())["weights_hash"]
    (example / "student" / "herd.json").write_text(json.dumps(lineage | {"parents": {"teacher": teacher}}))
    page = build_page(example).read_text()
    told = re.search(r'aria-label="(Family tree: [^"]+)"', page).group(1)
    assert "long 8.4 M, parent of (instruct 8.4 M) and student 3.8 M" in told


def test_the_student_and_its_control_share_a_chart(example):
    page = build_page(example).read_text()
    assert page.count("<figcaption>student and control</figcaption>") == 1
    assert 'aria-label="Loss of student and control: control ends at' in page or (
        'aria-label="Loss of student and control: student ends at' in page
    )


PARTS = (
    "run.json machine.json scores.json samples.json stages/tokenizer stages/teacher/metrics.jsonl "
    "stages/long/stage.json stages/student teacher/herd.json long/config.json instruct"
).split()


@pytest.mark.parametrize("part", PARTS)
def test_any_part_may_be_missing(example, part):
    path = example / part
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    checked(example)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1, 2", b"null", b"3", b'"text"', b"\xff\xfe\x00", b"[{}]", b"{}"]
)
@pytest.mark.parametrize(
    "part",
    (
        "run.json machine.json scores.json samples.json stages/teacher/stage.json teacher/herd.json "
        "stages/teacher/metrics.jsonl"
    ).split(),
)
def test_any_part_may_be_broken_and_the_page_names_it(example, part, content):
    (example / part).write_bytes(content)
    text = checked(example)
    harmless = content in (b"{}", b"[{}]", b"") and load_run(example).problems == []
    assert harmless or "Some records could not be read" in text


def test_an_almost_empty_run_says_not_measured(tmp_path):
    (tmp_path / "run.json").write_text('{"name": "young"}')
    text = checked(tmp_path)
    assert text.count("not measured") >= 6
    assert "“young”" in text


def test_a_folder_that_is_no_run_is_refused_and_stays_untouched(tmp_path):
    with pytest.raises(ReportError, match="is not a run"):
        build_page(tmp_path)
    assert list(tmp_path.iterdir()) == []


scalar = st.none() | st.booleans() | st.integers(-10, 10**13) | st.floats(width=32) | st.text(max_size=12)
loose = st.recursive(
    scalar,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


STAGE = """
    seconds tokens flops peak_rss_bytes n_params gates notes model title predicted_seconds bytes_per_token vocab_size
"""


def records(names: str, values=loose):
    return st.dictionaries(st.sampled_from(names.split()), values)


@given(
    stage=records(STAGE),
    plan=records("name seed mode stages created text predicted_seconds speeds"),
    where=records("machine commit", records("cpu cores isa memory_bytes hash dirty") | loose),
    score=records("model name value unit lo hi n detail"),
)
@settings(
    max_examples=60,
    deadline=None,
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_records_of_any_shape_make_a_page(tmp_path_factory, stage, plan, where, score):
    folder = tmp_path_factory.mktemp("loose")
    (folder / "stages" / "teacher").mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(plan))
    (folder / "stages" / "teacher" / "stage.json").write_text(json.dumps(stage))
    (folder / "machine.json").write_text(json.dumps(where))
    (folder / "scores.json").write_text(json.dumps([score]))
    html = build_page(folder).read_text(encoding="utf-8")
    assert html.rstrip().endswith("</html>")


def test_both_palettes_have_every_colour_and_enough_contrast():
    assert palette.LIGHT.keys() == palette.DARK.keys()

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for colours in (palette.LIGHT, palette.DARK):
        wanted = dict.fromkeys(("teacher", "long", "instruct", "student", "control", "faint"), 3.0)
        wanted |= dict.fromkeys(("soft", "good", "bad", "accent"), 4.5) | {"ink": 7.0}
        for name, least in wanted.items():
            pair = sorted((luminance(colours[name]), luminance(colours["paper"])), reverse=True)
            assert (pair[0] + 0.05) / (pair[1] + 0.05) >= least, (name, colours[name])


def test_the_page_is_built_without_torch(example):
    code = (
        "import sys; from herd.report.page import build_page; build_page(sys.argv[1]); "
        "sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(example)]).returncode == 0
