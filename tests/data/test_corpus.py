"""A corpus has three splits that share no text. Bad files are refused in one line."""

import gzip
import json
import sysconfig
from collections import Counter
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from herd.data import builtin, hub, text_files
from herd.data.corpus import SPLITS, load_corpus, read_corpus, split_corpus, split_of
from herd.data.sources import Document, part_end, read_path
from herd.data.text_files import DataWarning, decode_blocks
from herd.errors import DataError

LONG = (
    "This paragraph is long enough to be noticed when it is found in more than one of the three splits "
    "of a corpus. " * 2
)


def texts(folder, suffix=".txt", n=30):
    for i in range(n):
        (folder / f"f{i:02d}{suffix}").write_text(f"text number {i}\n\nand its own paragraph {i}\n")


@pytest.fixture(scope="module")
def default():
    return load_corpus()


def test_default_corpus_has_every_kind_and_language(default):
    counts = default.counts()
    for split in SPLITS:
        assert "code/python" in counts[split]
        assert "text/en" in counts[split]
        for lang in builtin.LANGUAGES:
            assert counts[split][f"parallel/{lang}"][0] > 0
    assert default.n_bytes > 5_000_000
    assert counts["teacher"]["code/python"][1] > counts["heldout"]["code/python"][1] > 100_000


def test_reading_again_gives_the_same_corpus():
    root = Path(sysconfig.get_paths()["stdlib"]) / "email"
    first, second = (split_corpus(builtin.read_stdlib(root)) for _ in range(2))
    assert first == second


def paragraphs(documents):
    for document in documents:
        for paragraph in document.text.split("\n\n"):
            if len(paragraph) >= 130:
                yield " ".join(paragraph.split())


def test_default_splits_share_no_text(default):
    homes = {}
    for split in SPLITS:
        for document in default.splits[split]:
            file = document.source.partition("#")[0]
            assert homes.setdefault(file, split) == split
    whole = [{" ".join(d.text.split()) for d in default.splits[s]} for s in SPLITS]
    long = [set(paragraphs(default.splits[s])) for s in SPLITS]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert not whole[a] & whole[b]
        assert not long[a] & long[b]


def test_parallel_blocks_stay_together(default):
    homes = {}
    for split in SPLITS:
        for document in default.splits[split]:
            if document.kind == "parallel":
                block = document.source.partition("#")[0]
                assert homes.setdefault(block, split) == split
    assert len(homes) >= 30
    lines = {lang: builtin.parallel_lines(lang) for lang in builtin.LANGUAGES}
    assert {len(of) for of in lines.values()} == {len(lines["en"])}


def test_long_docstrings_are_documents():
    tree = __import__("ast").parse(
        f'"""{LONG}"""\nclass A:\n    def b(self):\n        """{LONG}\n\n        More."""\n'
    )
    found = dict(builtin.docstrings(tree))
    assert list(found) == ["module", "A.b"]
    assert found["A.b"] == LONG.rstrip() + " \n\nMore.\n" or found["A.b"].endswith("\n\nMore.\n")


def test_a_library_without_sources_is_one_line(tmp_path):
    with pytest.raises(DataError, match="this Python has no sources of its library; give your own text"):
        list(builtin.read_stdlib(tmp_path))


@given(
    documents=st.lists(
        st.tuples(
            st.sampled_from([f"f{i}" for i in range(12)]),
            st.lists(st.integers(0, 30), min_size=1, max_size=4),
        ),
        min_size=10,
        max_size=30,
    )
)
@settings(max_examples=25, deadline=None)
@pytest.mark.filterwarnings("ignore::herd.data.text_files.DataWarning")
def test_a_paragraph_stands_in_one_split_only(documents):
    """Documents made of a few long paragraphs that recur everywhere: each paragraph ends up in one split."""
    made = [
        Document("\n\n".join(f"{n} {LONG}" for n in ns) + f"\n\nend {i}", f)
        for i, (f, ns) in enumerate(documents)
    ]
    made += [Document(f"{name}: only here", name) for name in ("x", "y", "z")]
    corpus = split_corpus(made)
    owner = {}
    for split in SPLITS:
        for document in corpus.splits[split]:
            for paragraph in paragraphs([document]):
                assert owner.setdefault(paragraph, split) == split
    kept = set(owner)
    assert kept == set(paragraphs(made)), "a paragraph of the corpus is nowhere"


def test_split_depends_on_the_file_name_alone():
    assert split_of("a/b.py") == split_of("a/b.py#Class.method")
    counts = Counter(split_of(f"file{i}") for i in range(5000))
    assert [round(counts[s] / 5000, 1) for s in SPLITS] == [0.6, 0.3, 0.1]
    homes = {}
    for n in (100, 200):
        corpus = split_corpus(Document(f"text {i}", f"file{i}") for i in range(n))
        for split in SPLITS:
            for document in corpus.splits[split]:
                assert homes.setdefault(document.source, split) == split


def test_exact_copies_are_left_out():
    documents = [Document(f"text  {i % 40}\n", f"f{i}") for i in range(100)]
    corpus = split_corpus([*documents, Document("text 1", "spaced")])
    assert corpus.notes == ("corpus: left out 61 documents that are copies of others",)
    assert sum(map(len, corpus.splits.values())) == 40


def test_a_tiny_corpus_is_divided_or_refused():
    with pytest.raises(DataError, match="empty, no document"):
        split_corpus([])
    with pytest.raises(DataError, match="empty"):
        split_corpus([Document("  \n", "a")])
    with pytest.raises(DataError, match=r"1 bytes in 1 piece"):
        split_corpus([Document("x", "a")])
    names = [f"n{i}" for i in range(200) if split_of(f"n{i}") == "teacher"][:3]
    with pytest.warns(DataWarning, match=r"moved n\d+ to the"):
        corpus = split_corpus([Document(f"text {n}", n) for n in names])
    assert all(len(corpus.splits[s]) == 1 for s in SPLITS)
    assert len(corpus.notes) == 2


def test_a_single_book_is_divided(tmp_path):
    (tmp_path / "book.txt").write_text("\n\n".join(f"Paragraph {i}. " + "word " * 40 for i in range(400)))
    corpus = load_corpus(tmp_path / "book.txt")
    assert all(corpus.splits[s] for s in SPLITS)
    parts = [document for split in SPLITS for document in corpus.splits[split]]
    whole = "".join(d.text for d in sorted(parts, key=lambda d: d.source))
    assert whole == (tmp_path / "book.txt").read_text()


def test_a_file_of_one_byte_is_refused(tmp_path):
    (tmp_path / "one.txt").write_text("x")
    with pytest.raises(DataError, match=r"1 bytes in 1 piece.* cannot be divided"):
        load_corpus(tmp_path / "one.txt")


@given(st.text(max_size=3000), st.integers(4, 400))
def test_cutting_loses_nothing(text, size):
    pieces, rest = [], text
    while len(rest) > size:
        end = part_end(rest[:size], size)
        assert 0 < end <= size
        pieces.append(rest[:end])
        rest = rest[end:]
    assert "".join([*pieces, rest]) == text


def test_a_folder_is_read_recursively_in_a_fixed_order(tmp_path):
    texts(tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "code.py").write_text("x = 1\n")
    (tmp_path / ".hidden").write_text("no")
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "a.txt").write_text("no")
    found = list(read_path(tmp_path))
    assert [d.source for d in found] == [f"f{i:02d}.txt" for i in range(30)] + ["sub/code.py"]
    assert (found[-1].kind, found[-1].lang) == ("code", "python")
    assert (found[0].kind, found[0].lang) == ("text", "und")


def test_binary_files_are_refused_or_skipped(tmp_path):
    texts(tmp_path, n=25)
    (tmp_path / "a.bin").write_bytes(b"abc\0def")
    (tmp_path / "b.txt").write_bytes("é".encode("latin-1"))
    (tmp_path / "empty.txt").write_text("")
    with pytest.warns(DataWarning, match=r"skipped 3 of 28 files \(1 empty, 2 not UTF-8 text\)"):
        corpus = load_corpus(tmp_path)
    assert any("skipped 3" in note for note in corpus.notes)
    with pytest.raises(DataError, match=r"a.bin: binary file, NUL at byte 3"):
        list(read_path(tmp_path / "a.bin"))
    with pytest.raises(DataError, match=r"b.txt: not UTF-8 at byte 0"):
        list(read_path(tmp_path / "b.txt"))
    with pytest.raises(DataError, match="empty file"):
        list(read_path(tmp_path / "empty.txt"))
    with pytest.raises(DataError, match="no such file"):
        list(read_corpus(tmp_path / "nothing"))


def test_a_folder_without_text_is_refused(tmp_path):
    with pytest.raises(DataError, match="no text in any of its 0 files"):
        list(read_path(tmp_path))
    (tmp_path / "a").write_bytes(b"\0")
    with pytest.warns(DataWarning), pytest.raises(DataError, match="no text in any of its 1 files"):
        list(read_path(tmp_path))


def test_an_unreadable_file_is_named(tmp_path, monkeypatch):
    def refuse(file):
        raise PermissionError(13, "Permission denied")

    file = tmp_path / "a.txt"
    file.write_text("x")
    monkeypatch.setattr(text_files, "_open", refuse)
    with pytest.raises(DataError, match=r"a.txt: cannot be read .*Permission denied"):
        list(read_path(file))


@given(st.binary(max_size=300), st.integers(1, 40))
@settings(max_examples=200, deadline=None)
def test_decoding_block_by_block_equals_decoding_at_once(data, block):
    """Blocks of any size give the same text, or the same bad byte, as Python's own decoder."""
    import io

    previous, text_files.BLOCK_BYTES = text_files.BLOCK_BYTES, block
    try:
        text = "".join(decode_blocks(io.BytesIO(data), "f"))
    except DataError as error:
        bad = int(str(error).partition("byte ")[2].partition(";")[0])
        if data[bad] != 0:
            with pytest.raises(UnicodeDecodeError) as truth:
                data.decode()
            assert truth.value.start == bad
    else:
        assert text == data.decode().removeprefix("\ufeff")
    finally:
        text_files.BLOCK_BYTES = previous


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_json_lines_are_read_plain_and_compressed(tmp_path, ending):
    rows = [{"text": f"row {i} é", "lang": "fr"} for i in range(5)]
    data = "".join(json.dumps(row) + "\n\n" for row in rows).encode()
    path = tmp_path / f"rows.jsonl{ending}"
    path.write_bytes(packed(data, ending))
    found = list(read_path(path))
    assert [d.text for d in found] == [row["text"] for row in rows]
    assert {d.lang for d in found} == {"fr"}
    assert len({d.source for d in found}) == 5


def packed(data, ending):
    if ending == ".gz":
        return gzip.compress(data)
    if ending == ".zst":  # two frames, as `cat a.zst b.zst` makes
        pack = zstandard.ZstdCompressor().compress
        return pack(data[:20]) + pack(data[20:])
    return data


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_truncated_archives_are_refused(tmp_path, ending):
    whole = packed(b"some text to read\n" * 5000, ending)
    for size in (len(whole) - 1, len(whole) // 2, 10):
        path = tmp_path / f"a.txt{ending}"
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"a\.txt") as error:
            list(read_path(path))
        assert "\n" not in str(error.value)
    path.write_bytes(b"not packed at all")
    with pytest.raises(DataError, match=r"a\.txt"):
        list(read_path(path))


@pytest.mark.parametrize(
    "line, match",
    [
        ("{", "a.jsonl:2: not JSON"),
        ("[1]", "a.jsonl:2: list instead of an object"),
        ('{"body": "x"}', r"a.jsonl:2: no string 'text' among \['body'\]"),
        ('{"text": 5}', "a.jsonl:2: no string 'text'"),
        ('{"text": "\\ud800"}', "a.jsonl:2: half a surrogate pair at character 0"),
    ],
)
def test_bad_json_lines_are_named(tmp_path, line, match):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(DataError, match=match):
        list(read_path(tmp_path / "a.jsonl"))


def test_several_paths_are_told_apart_and_reading_stops_at_the_limit(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name / "same").mkdir(parents=True)
        texts(tmp_path / name / "same", n=3)
    spec = [tmp_path / "one" / "same", tmp_path / "two" / "same"]
    sources = [d.source for d in read_corpus(spec)]
    assert len(set(sources)) == 6
    texts(tmp_path / "one")
    with pytest.warns(DataWarning, match="stopped after"):
        corpus = load_corpus(tmp_path / "one", max_bytes=400)
    assert 400 <= corpus.n_bytes < 450


def test_a_byte_order_mark_is_not_text(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffhello".encode())
    assert [d.text for d in read_path(tmp_path / "a.txt")] == ["hello"]


# The hub, without a network


def test_the_best_files_of_a_hub_data_set_are_chosen():
    files = ["README.md", "data/test-0.parquet", "data/train-0.parquet", "data/train-1.parquet", "x.txt"]
    assert hub.choose_files(files) == ["data/train-0.parquet", "data/train-1.parquet"]
    assert hub.choose_files([*files, "b.jsonl.zst", "a.jsonl"]) == ["a.jsonl", "b.jsonl.zst"]
    assert hub.choose_files(files, "test") == ["data/test-0.parquet"]
    assert hub.choose_files(["a.bin"]) == []


def test_files_of_the_hub_are_read(monkeypatch, tmp_path):
    import huggingface_hub

    (tmp_path / "train.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    monkeypatch.setattr(
        huggingface_hub.HfApi, "list_repo_files", lambda self, repo, repo_type: ["train.jsonl", "x.bin"]
    )
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda repo, file, repo_type: str(tmp_path / file)
    )
    found = list(read_corpus("hf:me/mine"))
    assert [(d.text, d.source) for d in found] == [
        ("one", "hf:me/mine/train.jsonl@0000001"),
        ("two", "hf:me/mine/train.jsonl@0000002"),
    ]
    with pytest.raises(DataError, match="among its 2 files"):
        list(read_corpus("hf:me/mine:nothing"))


def test_an_unreachable_hub_is_one_line(monkeypatch):
    import huggingface_hub

    def offline(self, repo, repo_type):
        raise huggingface_hub.errors.OfflineModeIsEnabled("Cannot reach https://huggingface.co\nmore lines")

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", offline)
    with pytest.raises(
        DataError, match=r"^hf:a/b: cannot be read .*Cannot reach.*check the name and the network$"
    ):
        list(read_corpus("hf:a/b"))
