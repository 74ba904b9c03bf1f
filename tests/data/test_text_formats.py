"""Rows of text and unusual paths are read, followed or refused, never read as something else."""

import bz2
import csv
import gzip
import json
import lzma
from pathlib import Path

import pytest

from herd.data.corpus import load_corpus, read_corpus
from herd.data.sources import read_path
from herd.data.text_files import DataWarning, expand_paths
from herd.errors import DataError

TEXTS = ['one, "two"', "three\n\nfour", "fünf"]


def texts_of(spec: object) -> list[str]:
    return [document.text for document in read_corpus(spec)]


def test_a_json_array_is_read_row_by_row(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    rows = [{"text": text, "lang": "de"} for text in TEXTS]
    for value in (rows, TEXTS, {"data": rows, "version": 1}, [{"content": text} for text in TEXTS]):
        path.write_text(json.dumps(value))
        assert texts_of(path) == TEXTS
    path.write_text("\n".join(json.dumps(row) for row in rows))  # JSON lines under the wrong ending
    assert texts_of(path) == TEXTS
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(json.dumps(rows).encode()))
    assert texts_of(tmp_path / "a.json.gz") == TEXTS


@pytest.mark.parametrize("ending, delimiter", [(".csv", ","), (".tsv", "\t")])
def test_tables_are_read_row_by_row(tmp_path: Path, ending: str, delimiter: str) -> None:
    path = tmp_path / f"a{ending}"
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerows([["id", "text"], *([n, text] for n, text in enumerate(TEXTS))])
    assert texts_of(path) == TEXTS
    long = "word " * 100_000
    path.write_text(f"text{delimiter}id\n{long}{delimiter}1\n")
    assert texts_of(path) == [long]


def test_parquet_is_read_row_by_row(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([{"text": text} for text in TEXTS]), path)
    assert texts_of(path) == TEXTS
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    with pytest.raises(DataError, match=r"a\.parquet: not a Parquet file"):
        texts_of(path)
    path.write_bytes(whole[:4] + bytes(40) + whole[44:])
    with pytest.raises(DataError, match=r"a\.parquet: damaged after row 0"):
        texts_of(path)


@pytest.mark.parametrize(
    "name, content, match",
    [
        ("a.json", '{"name": "settings"}', r"row 0: no string 'text' among \['name'\]"),
        ("a.json", "[1, 2]", "row 0: int instead of an object"),
        ("a.json", "[]", "not a list of rows"),
        ("a.json", '"text"', "not a list of rows"),
        ("a.json", "[{]", "not JSON"),
        ("a.json", "", "empty file"),
        ("a.json", '[{"text": "a"}, {"body": "b"}]', "row 1: no string 'text'"),
        ("a.csv", "a,b\n1,2\n", r"a\.csv:2: no string 'text' among \['a', 'b'\]"),
        ("a.csv", "text,b\nx,1,2\n", r"a\.csv:2: more fields than the header"),
        ("a.csv", 'text\n"x" y\n', r"a\.csv: not CSV after line 1"),
        ("a.csv", "text,b\n1\0,2\n", "NUL at byte 8"),
        ("a.jsonl", '{"messages": []}', "data.kind: dialogs in a recipe"),
    ],
)
def test_files_without_rows_of_text_are_refused(tmp_path: Path, name: str, content: str, match: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=match) as error:
        texts_of(tmp_path / name)
    assert "\n" not in str(error.value)


def test_settings_and_tables_of_numbers_in_a_folder_are_skipped_and_counted(tmp_path: Path) -> None:
    (tmp_path / "package.json").write_text('{"name": "x"}')
    (tmp_path / "numbers.csv").write_text("a,b\n1,2\n")
    (tmp_path / "z.txt").write_text("text")
    with pytest.warns(DataWarning, match=r"skipped 2 of 3 files \(2 no rows with text\)"):
        assert texts_of(tmp_path) == ["text"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonlines", "a", "a.ipynb"])
@pytest.mark.parametrize(
    "content", ['{"text": "a"}\n{"text": "b"}\n', '[\n {"text": "a"}\n]', '{"cells": [1]}']
)
def test_json_under_another_name_is_read_as_text_with_a_warning(
    tmp_path: Path, name: str, content: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.warns(DataWarning, match=rf"{name}: is JSON and is read as running text"):
        assert texts_of(tmp_path / name) == [content]


@pytest.mark.parametrize("content", ["{this} is text", "[1] A footnote", "[note] x", "{}x"])
def test_text_in_brackets_is_no_json(tmp_path: Path, content: str, recwarn) -> None:
    (tmp_path / "a.txt").write_text(content)
    assert texts_of(tmp_path / "a.txt") == [content]
    assert not recwarn


@pytest.mark.parametrize(
    "ending, pack", [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)]
)
def test_compressed_text_is_read(tmp_path: Path, ending: str, pack) -> None:
    (tmp_path / f"a.txt{ending}").write_bytes(pack(b"\xef\xbb\xbfhello"))
    assert texts_of(tmp_path / f"a.txt{ending}") == ["hello"]


def test_gzip_data_is_known_by_its_first_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(gzip.compress(b"hello"))
    assert texts_of(tmp_path / "a.txt") == ["hello"]


@pytest.mark.parametrize(
    "encoding, said",
    [
        ("utf-16", "UTF-16, not UTF-8 at byte 0"),
        ("utf-32", "UTF-32, not UTF-8 at byte 0"),
        ("utf-16-le", "NUL at byte 1"),
        ("latin-1", "not UTF-8 at byte 1"),
        ("shift_jis", "not UTF-8 at byte 1"),
    ],
)
def test_other_encodings_are_refused_with_the_byte(tmp_path: Path, encoding: str, said: str) -> None:
    (tmp_path / "a.txt").write_bytes(
        "aé".replace("é", "日" if encoding == "shift_jis" else "é").encode(encoding)
    )
    with pytest.raises(DataError, match=said):
        texts_of(tmp_path / "a.txt")


def test_the_home_folder_and_patterns_are_expanded(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "sub").mkdir()
    for name in ("b.txt", "a.txt", "c.md", "sub/d.txt", "odd[1].txt"):
        (tmp_path / name).write_text(name)
    assert texts_of("~/a.txt") == ["a.txt"]
    assert texts_of("~/?.txt") == ["a.txt", "b.txt"]
    assert texts_of(["~/**/*.txt"]) == ["a.txt", "b.txt", "odd[1].txt", "sub/d.txt"]
    assert expand_paths(tmp_path / "odd[1].txt") == [tmp_path / "odd[1].txt"]
    with pytest.raises(DataError, match="no file or folder matches"):
        texts_of("~/*.rst")
    with pytest.raises(DataError, match="no such file"):
        texts_of("~nobody-of-this-name/x")


def test_linked_folders_are_followed_once(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "b.txt").write_text("b")
    (tmp_path / "outside" / "back").symlink_to(tmp_path / "root")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "a.txt").write_text("a")
    (tmp_path / "root" / "link").symlink_to(tmp_path / "outside")
    (tmp_path / "root" / "self").symlink_to(tmp_path / "root")
    assert [d.source for d in read_path(tmp_path / "root")] == ["a.txt", "link/b.txt"]


def test_a_link_to_nothing_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").symlink_to(tmp_path / "gone")
    with pytest.warns(DataWarning, match=r"b\.txt: skipped, it is a link to nothing"):
        assert texts_of(tmp_path) == ["a"]


def test_many_files_of_a_pattern_are_not_cut_into_small_parts(tmp_path: Path) -> None:
    for number in range(30):
        (tmp_path / f"{number}.txt").write_text(f"{number} word " * 1000)
    assert len(texts_of(str(tmp_path / "*.txt"))) == 30
    assert load_corpus(str(tmp_path / "*.txt")) == load_corpus(tmp_path)
