"""A run that is resumed goes on with the text and the options it began with, or says what changed."""

import io
import random
import re
from pathlib import Path

import pytest
from rich.console import Console

from herd.data.copying import CopyStream
from herd.errors import DataError
from herd.files import write_json
from herd.life import raise_, raise_herd
from herd.life.measure import MODELS
from herd.life.plan import make_plan
from herd.life.recipes import STUDENT_SEED
from herd.life.run import RaiseRun
from herd.life.show import Show
from herd.life.summary import print_summary

pytestmark = pytest.mark.filterwarnings("ignore::herd.data.text_files.DataWarning")


def stop(run: RaiseRun) -> None:
    raise KeyboardInterrupt


def quiet() -> Show:
    return Show({}, Console(file=io.StringIO()))


def words(n: int) -> str:
    draw = random.Random(0)
    return " ".join("".join(draw.choices("abcdefgh ", k=6)) for _ in range(n))


@pytest.fixture
def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A run that was stopped after its tokenizer stage, and its text."""
    tokenizer, teacher, *_ = raise_.STAGES
    monkeypatch.setattr(raise_, "STAGES", [tokenizer, type(teacher)("teacher", "", stop)])
    text = tmp_path / "text.txt"
    text.write_text(words(20_000))
    with pytest.raises(KeyboardInterrupt):
        raise_herd(tmp_path / "run", "quick", seed=3, text=[str(text)], show=quiet())
    return tmp_path / "run", text


def test_edited_text_is_refused_on_resuming(begun: tuple[Path, Path]) -> None:
    folder, text = begun
    with pytest.raises(KeyboardInterrupt):
        raise_herd(folder, resume=True, show=quiet())
    text.write_text(text.read_text().swapcase())
    with pytest.raises(DataError, match=r"text\.txt has other content .*another --name"):
        raise_herd(folder, resume=True, show=quiet())
    assert (folder / "data").exists()
    text.unlink()
    with pytest.raises(DataError, match=r"text\.txt: no such file"):
        raise_herd(folder, resume=True, show=quiet())


@pytest.mark.parametrize(
    "options, match",
    [
        ({"text": ["other.txt"]}, r"started with text .*text\.txt'\], not \['other\.txt'\]"),
        ({"seed": 4}, "started with seed 3, not 4"),
        ({"mode": "full"}, "started with mode 'quick', not 'full'"),
    ],
)
def test_other_options_are_refused_on_resuming(begun: tuple[Path, Path], options: dict, match: str) -> None:
    with pytest.raises(DataError, match=match):
        raise_herd(begun[0], resume=True, show=quiet(), **options)


def test_text_too_short_for_a_row_is_refused_by_the_first_stage(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(words(300))
    with pytest.raises(
        DataError, match=r"too few: the \w+ part has \d+ tokens, but one training row has 512; give"
    ):
        raise_herd(tmp_path / "run", "quick", text=[str(text)], show=quiet())
    assert not (tmp_path / "run").exists()


def test_the_summary_leaves_out_an_interval_that_is_unknown(tmp_path: Path) -> None:
    """One held-out document gives no interval: its bounds are null."""
    plan = make_plan("tiny", "quick", 0, None)
    run = RaiseRun(tmp_path, plan, quiet())
    for model in MODELS:
        write_json(run.stage_folder(model) / "stage.json", {"n_params": 1_000_000})
    scores = [{"model": m, "name": "bpb", "value": 2.0, "lo": None, "hi": None} for m in MODELS]
    scores.append({"model": "student", "name": "bpb_vs_control", "value": 0.1, "lo": None, "hi": None})
    write_json(tmp_path / "scores.json", scores)
    console = Console(file=io.StringIO(), width=100)
    print_summary(run, console)
    assert "+0.100 bits/byte (too little text for an interval)" in console.file.getvalue()


def test_a_seed_of_any_size_can_be_used() -> None:
    from herd.llama.model import LlamaLM

    config = make_plan("tiny", "quick", 0, None).student_config
    for seed in (20261127180000, 2**64 + 1, -5):
        plan = make_plan("tiny", "quick", seed, None)
        assert plan.seed == seed
        LlamaLM(config).init_weights(plan.seed + STUDENT_SEED)
        stream = CopyStream(600, 64, plan.seed)
        assert len(stream.batch(0, 2)) == 2


def test_little_text_is_read_with_a_word_on_how_often(begun: tuple[Path, Path]) -> None:
    run = RaiseRun(begun[0], RaiseRun.saved_plan(begun[0]), quiet())
    assert not run.data.notes_on_size(120_000)  # a quick run reads its 120 kB less than once
    plan = run.plan.model_copy(update={"training": make_plan("x", "demo", 0, None).training})
    (note,) = RaiseRun(begun[0], plan, quiet()).data.notes_on_size(120_000)
    passes, wanted = (
        int(n.replace(",", "")) for n in re.findall(r"read it ([\d,]+) times .* ([\d,]+) bytes", note)[0]
    )
    assert 20 < passes < 200
    assert wanted == pytest.approx(120_000 * passes / 8, rel=0.1)
