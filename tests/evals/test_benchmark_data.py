"""The data sets of benchmarks: files as the documentation describes them, and downloads from a hub on loopback."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path

import pytest

from herd.cli import run
from herd.errors import DataError
from herd.evals.tasks import SUITES, TASKS, Data, make_task
from herd.evals.tasks.data import BUILTIN
from herd.evals.tasks.hub_data import FILES, HubData

sys.path.append(str(Path(__file__).parents[1] / "checkpoint"))
from hub import Hub, serve

GUIDE = (Path(__file__).parents[2] / "docs" / "how-to" / "benchmarks.md").read_text(encoding="utf-8")


def documented() -> dict[str, tuple[list[str], list[str]]]:
    """Return files and fields by task, from the table of the guide."""
    rows = {}
    for line in GUIDE.splitlines():
        if line.startswith("| `"):
            tasks, files, fields = (re.findall(r"`([^`]+)`", cell) for cell in line.strip("|").split("|"))
            rows |= dict.fromkeys(tasks, (files, fields))
    return rows


class Watched(Data):
    """Data that note which files are asked for."""

    def find(self, *names):
        asked.extend(names)
        return super().find(*names)


asked: list[str] = []
FILES_OF = documented()
LONG = re.compile("needle_|ruler_(?!questions)")


def test_the_guide_has_every_task():
    assert {name for name in TASKS if not name.startswith("mmlu_")} | {"mmlu_SUBJECT"} == FILES_OF.keys()


# of the tasks of long texts, which share a row, one
@pytest.mark.parametrize(
    "key", [name for name in FILES_OF if not LONG.match(name) or name == "needle_single"]
)
def test_the_guide_names_the_files_that_a_task_reads(key, tmp_path):
    name = key.replace("SUBJECT", "stem")
    asked.clear()
    for folder in (BUILTIN, tmp_path):  # some files are only asked for if others are missing
        try:
            make_task(name).items(Watched(folder))
        except DataError:
            assert folder == tmp_path
    patterns = [re.sub("LANG|CATEGORY", "*", file) for file in FILES_OF[key][0] if "/" in file]
    known = {pattern for file in asked for pattern in patterns if Path(file).match(pattern)}
    assert known == set(patterns)
    assert [file for file in asked if not any(Path(file).match(pattern) for pattern in patterns)] == []


@pytest.mark.parametrize(
    "name", [name for name, (files, _) in FILES_OF.items() if files and files[0].endswith("l")]
)
def test_the_fields_of_the_guide_are_enough(name, tmp_path):
    name = name.replace("SUBJECT", "stem")
    files, fields = FILES_OF[name.replace("stem", "SUBJECT")]
    file = next(file for file in files if (BUILTIN / file).exists())
    (tmp_path / file).parent.mkdir()
    rows = [json.loads(line) for line in (BUILTIN / file).read_text(encoding="utf-8").splitlines()]
    (tmp_path / file).write_text(
        "".join(f"{json.dumps({key: row[key] for key in fields})}\n" for row in rows)
    )
    assert len(make_task(name).items(Data(tmp_path))) == len(make_task(name).items(Data()))


def parquet(rows: list[dict]) -> bytes:
    arrow, tables = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    out = io.BytesIO()
    tables.write_table(arrow.Table.from_pylist(rows), out)
    return out.getvalue()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that the client uses, and empty caches."""
    constants = pytest.importorskip("huggingface_hub.constants")
    hub = Hub()
    with serve(hub) as address:
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        for name, value in (
            ("ENDPOINT", address), ("HUGGINGFACE_CO_URL_TEMPLATE", template), ("HF_HUB_OFFLINE", False),
            ("HF_HUB_CACHE", str(tmp_path / "hub-cache")),
        ):  # fmt: skip
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr("herd.evals.tasks.hub_data.cache_folder", lambda: tmp_path / "herd-cache")
        yield hub


def test_data_sets_are_downloaded_once_when_a_task_asks_for_them(hub, capsys):
    """In all parts, with the splits of one file after each other, and as the task reads them."""
    rows = Data().rows("boolq/validation.jsonl")
    hub.files["google/boolq"] = {
        "default/validation/0000.parquet": parquet(rows[:4]), "default/validation/0001.parquet": parquet(rows[4:]),
        "default/train/0000.parquet": parquet(rows[:6]),
    }  # fmt: skip
    items = make_task("boolq").items(HubData())
    assert [item.gold for item in items] == [item.gold for item in make_task("boolq").items(Data())]
    assert "downloading boolq/train.jsonl from hf:google/boolq" in capsys.readouterr().err
    n_requests = len(hub.requests)
    assert make_task("boolq").items(HubData()) == items
    assert len(hub.requests) == n_requests
    mbpp = [row | {"task_id": number} for number, row in enumerate(Data().rows("mbpp/mbpp.jsonl"), 2)]
    hub.files["google-research-datasets/mbpp"] = {
        "full/prompt/0000.parquet": parquet(mbpp[:3]), "full/test/0000.parquet": parquet(mbpp[3:]),
        "sanitized/test/0000.parquet": parquet(mbpp),
    }  # fmt: skip
    assert [row["task_id"] for row in HubData().rows("mbpp/mbpp.jsonl")] == [row["task_id"] for row in mbpp]
    hub.files["juletxara/mgsm"] = {
        "de/test/0000.parquet": parquet([{"question": "Wie viele\nsind es?", "answer_number": 3}])
    }
    assert HubData().text("mgsm/mgsm_de.tsv") == "Wie viele sind es?\t3\n"


def test_every_file_of_the_hub_is_one_that_a_task_reads():
    patterns = [re.sub("LANG", "*", file) for files, _ in FILES_OF.values() for file in files]
    assert [file for file in FILES if not any(Path(file).match(pattern) for pattern in patterns)] == []
    for entry in SUITES["llama31"]:  # the whole suite can be downloaded
        files = FILES_OF["mmlu_SUBJECT" if entry.task.startswith("mmlu_") else entry.task][0]
        assert set(files) & set(FILES), entry.task


def test_what_the_hub_does_not_have_is_one_line(hub, tmp_path, monkeypatch, capsys):
    hub.files["Rowan/hellaswag"] = {"default/other/0000.parquet": parquet([{"a": 1}])}
    with pytest.raises(DataError, match=r"hf:Rowan/hellaswag: has no \*/validation; give your own copy"):
        make_task("hellaswag").items(HubData())
    with pytest.raises(DataError, match="hf:baber/piqa: cannot be read from the Hugging Face hub"):
        make_task("piqa").items(HubData())
    with pytest.raises(DataError, match=r"no bfcl/BFCL_v4_simple_python.json in .*benchmarks: put it there"):
        make_task("bfcl").items(HubData())
    monkeypatch.chdir(tmp_path)
    assert run(["eval", "http://127.0.0.1:9", "--tasks", "piqa", "--data", "hf", "--model", "x"]) == 1
    assert not list((tmp_path / "herd-cache" / "benchmarks").rglob("*.jsonl"))
