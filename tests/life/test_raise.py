"""All stages of a quick run, and a run that was interrupted twice and ends with the same bits."""

import io
import json
import shutil
import sysconfig
from pathlib import Path

import pytest
import torch
from rich.console import Console

from herd.checkpoint import checkpoint_hash, load_lineage, load_model, load_tokenizer
from herd.errors import DataError
from herd.life import raise_herd
from herd.life.live import Live
from herd.life.measure import MODELS
from herd.life.run import RaiseRun, RaiseStage
from herd.life.show import Show
from herd.train.metrics import read
from herd.train.recipe import read_recipe
from herd.train.run import run_recipe

LIBRARY = Path(sysconfig.get_paths()["stdlib"])
TEXT = [str(LIBRARY / "json"), str(LIBRARY / "asyncio"), str(LIBRARY / "email")]


def quiet() -> Show:
    return Show({}, Console(file=io.StringIO()))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RaiseRun:
    torch.set_num_threads(1)
    return raise_herd(tmp_path_factory.mktemp("runs") / "quick", "quick", text=TEXT, show=quiet())


def test_every_model_is_a_checkpoint_with_a_family(run: RaiseRun) -> None:
    for name in MODELS:
        model = load_model(run.folder / name)
        lineage = load_lineage(run.folder / name)
        tokenizer = load_tokenizer(run.folder / name)
        assert lineage is not None
        assert tokenizer is not None
        assert lineage.stage == name
        assert lineage.weights_hash == checkpoint_hash(run.folder / name)
        assert model.config.vocab_size == tokenizer.vocab_size
        for parent, its_hash in lineage.parents.items():
            assert its_hash == checkpoint_hash(run.folder / parent)
    assert load_lineage(run.folder / "student").parents.keys() == {"instruct"}
    assert load_lineage(run.folder / "control").parents == {}


def test_training_learned_something(run: RaiseRun) -> None:
    losses = [record["loss"] for record in read(run.folder / "stages/teacher/text") if "loss" in record]
    assert losses[-1] < losses[0] - 1


def test_a_stage_is_a_recipe_that_a_user_can_change_and_run(run: RaiseRun, tmp_path: Path) -> None:
    folders = [path.parent for path in sorted((run.folder / "stages").rglob("recipe.yaml"))]
    names = {folder.relative_to(run.folder / "stages").as_posix() for folder in folders}
    assert names == {"teacher/copying", "teacher/text", "long/512", "instruct", "student", "control"}
    text = (run.folder / "stages/control/recipe.yaml").read_text()
    mine = tmp_path / "mine.yaml"
    mine.write_text(text.replace(str(run.folder / "stages/control"), str(tmp_path / "out")))
    checkpoint, _ = run_recipe(read_recipe(mine))  # without a change it gives the same bits
    assert checkpoint_hash(checkpoint) == checkpoint_hash(run.folder / "control")
    mine.write_text(
        mine.read_text().replace("steps: 20", "steps: 3").replace("decay_steps: 5", "decay_steps: 2")
    )
    shutil.rmtree(tmp_path / "out")
    assert run_recipe(read_recipe(mine))[1].step == 3


def test_copying_is_measured_while_it_is_learned(run: RaiseRun) -> None:
    records = read(run.folder / "stages/teacher/copying")
    assert all(0 <= record["eval/copy_accuracy"] <= 1 for record in records if "eval/copy_accuracy" in record)
    gates = {gate["name"] for gate in run.record("teacher")["gates"]}
    assert gates == {"copying of fresh passages"}


def test_learning_to_copy_is_shown_when_it_comes() -> None:
    screen = io.StringIO()
    live = Live(Show({}, Console(file=screen, width=200)), "text", 10, (0.0, 1.0))
    for value in (0.02, 0.05, 0.9, 0.95):
        live.on_evaluate({"copy_accuracy": value, "heldout_loss": 1.0})
    lines = screen.getvalue().splitlines()
    assert [("2 %" in line, "learnt to copy" in line) for line in lines] == [(True, False), (False, True)]


def test_the_prediction_follows_the_time_of_finished_stages() -> None:
    show = Show({"a": 30.0, "b": 100.0}, Console(file=io.StringIO()))
    show.begin("a", "")
    show.end(60.0)
    show.begin("b", "")
    assert show.seconds_left == pytest.approx(100.0)
    show.predicted["c"] = 50.0
    assert show.seconds_left == pytest.approx(200.0)  # what has not begun takes twice its prediction


def test_student_and_control_see_the_same_tokens(run: RaiseRun) -> None:
    assert run.record("student")["tokens"] == run.record("control")["tokens"] > 0
    assert run.record("student")["n_params"] == run.record("control")["n_params"]
    assert (
        run.record("student")["flops"] > run.record("control")["flops"]
    )  # the teacher's forwards are charged


def test_scores_samples_and_page_are_there(run: RaiseRun) -> None:
    scores = {(s["model"], s["name"]): s for s in json.loads((run.folder / "scores.json").read_text())}
    for model in MODELS:
        assert scores[model, "bpb"]["lo"] <= scores[model, "bpb"]["value"] <= scores[model, "bpb"]["hi"]
    assert ("student", "bpb_vs_control") in scores
    assert ("instruct", "tool_use") in scores
    assert json.loads((run.folder / "samples.json").read_text())
    page = (run.folder / "report.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "student" in page


def test_splits_share_no_file(run: RaiseRun) -> None:
    counts = run.record("tokenizer")["corpus"]
    assert set(counts) == {"teacher", "student", "heldout"}
    assert all(of for of in counts.values())


def test_a_run_cut_short_ends_with_the_same_bits(
    run: RaiseRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stop inside the teacher's training and inside the student's, then resume: the same weights."""
    folder = tmp_path / "quick"
    whole = Live.on_step
    for stop_at in (37, 75):
        count = 0

        def stop(self, record: dict, stop_at: int = stop_at) -> None:
            nonlocal count
            count += 1
            if count == stop_at:
                raise KeyboardInterrupt

        monkeypatch.setattr(Live, "on_step", stop)
        with pytest.raises(KeyboardInterrupt):
            raise_herd(folder, "quick", text=TEXT, resume=True, show=quiet())
        assert not (folder / "report.html").exists()
    monkeypatch.setattr(Live, "on_step", whole)
    raise_herd(folder, "quick", text=TEXT, resume=True, show=quiet())
    for name in MODELS:
        assert checkpoint_hash(folder / name) == checkpoint_hash(run.folder / name)


def test_a_stage_done_is_not_done_again(run: RaiseRun) -> None:
    def never(_: RaiseRun) -> None:
        raise AssertionError

    run.carry_out([RaiseStage("teacher", "", never), RaiseStage("student", "", never)])


def test_what_is_there_is_left_alone(run: RaiseRun) -> None:
    before = (run.folder / "run.json").read_bytes()
    with pytest.raises(DataError, match="--resume"):
        raise_herd(run.folder, "quick", text=TEXT, show=quiet())
    assert (run.folder / "run.json").read_bytes() == before


@pytest.mark.parametrize(
    "make, word",
    [
        (lambda p: p.write_text(""), "empty"),
        (lambda p: p.write_bytes(b"\0\1\2" * 1000), "binary|NUL|text"),
        (lambda p: p.write_text("x"), "more text"),
        (lambda p: None, "exist|no such|missing"),
    ],
)
def test_bad_text_is_one_line_and_leaves_nothing(tmp_path: Path, make, word: str) -> None:
    import herd.cli

    file = tmp_path / "corpus.txt"
    make(file)
    with pytest.raises(DataError, match=f"(?i){word}"):
        raise_herd(tmp_path / "runs" / "x", "quick", text=[str(file)], show=quiet())
    assert not (tmp_path / "runs" / "x").exists()
    assert herd.cli.run(["raise", "--quick", "--text", str(file), "--runs", str(tmp_path / "runs2")]) == 1
