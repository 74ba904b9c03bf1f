"""A run that is resumed goes on with the text and the options it began with, or says what changed."""

from __future__ import annotations

import io
import random
from pathlib import Path

import pytest
from rich.console import Console

from herd.errors import DataError
from herd.life import raise_, raise_herd
from herd.life.run import RaiseRun
from herd.life.show import Show

pytestmark = pytest.mark.filterwarnings("ignore::herd.data.text_files.DataWarning")


def stop(run: RaiseRun) -> None:
    raise KeyboardInterrupt


def quiet() -> Show:
    return Show({}, Console(file=io.StringIO()))


@pytest.fixture
def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A run that was stopped after its tokenizer stage, and its text."""
    tokenizer, teacher, *_ = raise_.STAGES
    monkeypatch.setattr(raise_, "STAGES", [tokenizer, type(teacher)("teacher", "", stop)])
    draw = random.Random(0)
    text = tmp_path / "text.txt"
    text.write_text(" ".join("".join(draw.choices("abcdefgh ", k=6)) for _ in range(20_000)))
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
