"""Shards are read back as written. Every damage is refused in one line, and failed writing leaves nothing."""

import json
import os
import shutil

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from herd.data.shards import DOCUMENTS, INDEX, Shards
from herd.data.sources import Document
from herd.errors import DataError, StorageError


@pytest.fixture(autouse=True, scope="module")
def no_waiting_for_the_disk():
    """The tests write hundreds of small files. Nothing here depends on their surviving a power cut."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: None)
        yield


@given(texts=st.lists(st.text(max_size=30), min_size=1, max_size=12), file_tokens=st.integers(1, 60))
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_written_documents_are_read_back(tmp_path_factory, byte_tokenizer, texts, file_tokens):
    texts = [text.encode(errors="ignore").decode() for text in texts]
    folder = tmp_path_factory.mktemp("round") / "s"
    shards = Shards.write(folder, texts, byte_tokenizer, file_tokens=file_tokens)
    assert shards.n_documents == len(texts)
    assert shards.documents_D["n_bytes"].tolist() == [len(text.encode()) for text in texts]
    expected = [byte_tokenizer.encode(text, bos=True, eos=True) for text in texts]
    assert [shards.document(n).tolist() for n in range(len(texts))] == expected
    assert shards.tokens(0, shards.n_tokens).tolist() == [i for ids in expected for i in ids]
    for start, stop in ((0, 1), (shards.n_tokens // 3, shards.n_tokens), (1, 1)):
        assert shards.tokens(start, stop).tolist() == shards.tokens(0, shards.n_tokens)[start:stop].tolist()
    again = Shards.open(folder, byte_tokenizer)
    assert again.sha256 == shards.sha256


def test_documents_keep_their_size_and_label(shards, documents):
    assert len(shards.files) > 5
    assert [shards.label(n) for n in range(4)] == ["text/de", "text/en", "text/de", "text/en"]
    assert shards.documents_D["n_bytes"].tolist() == [document.n_bytes for document in documents]
    assert np.dtype(shards.index["dtype"]).itemsize == 2
    with pytest.raises(DataError, match="do not exist"):
        shards.tokens(0, shards.n_tokens + 1)


def test_large_vocabularies_take_four_bytes(tmp_path, byte_tokenizer):
    class Large:
        vocab_size, sha256, bos_id, eos_id = 128_256, "c" * 64, 128_000, 128_001

        def encode(self, text, bos=False, eos=False):
            return [128_000, 127_999, 5, 128_001]

    shards = Shards.write(tmp_path / "s", ["x"], Large())
    assert shards.document(0).tolist() == [128_000, 127_999, 5, 128_001]
    assert (tmp_path / "s" / "tokens-00000.bin").read_bytes() == np.array(
        [128_000, 127_999, 5, 128_001], "<u4"
    ).tobytes()
    with pytest.raises(DataError, match=r"hash cccccccccccc, not with bbbbbbbbbbbb"):
        Shards.open(tmp_path / "s", byte_tokenizer)


def read_whole(shards):
    return shards.tokens(0, shards.n_tokens)


def damaged(shards, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(shards.folder, folder)
    return folder


def test_every_truncation_is_refused_at_opening(shards, tmp_path):
    for name in sorted(p.name for p in shards.folder.iterdir()):
        folder = damaged(shards, tmp_path)
        os.truncate(folder / name, (folder / name).stat().st_size - 1)
        with pytest.raises(DataError, match="make the shards again") as error:
            Shards.open(folder)
        assert name in str(error.value)
        assert "\n" not in str(error.value)
        shutil.rmtree(folder)


@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), which=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_any_flipped_bit_is_found(shards, tmp_path_factory, where, bit, which):
    folder = damaged(shards, tmp_path_factory.mktemp("flip"))
    names = sorted(p.name for p in folder.iterdir())
    path = folder / names[which % len(names)]
    data = bytearray(path.read_bytes())
    data[int(where * len(data))] ^= 1 << bit
    path.write_bytes(data)
    with pytest.raises(DataError) as error:
        read_whole(Shards.open(folder))
    assert "\n" not in str(error.value)


def test_other_files_of_the_folder_still_read(shards, tmp_path):
    folder = damaged(shards, tmp_path)
    path = folder / "tokens-00001.bin"
    path.write_bytes(bytes(path.stat().st_size))
    opened = Shards.open(folder)
    assert len(opened.tokens(0, 400)) == 400
    with pytest.raises(DataError, match=r"tokens-00001.bin: corrupt"):
        opened.tokens(0, 600)
    with pytest.raises(DataError, match="corrupt"):
        read_whole(opened)


@pytest.mark.parametrize("index", ["", "[]", "{}", '{"format": "other"}', "{"])
def test_a_broken_index_is_refused(shards, tmp_path, index):
    folder = damaged(shards, tmp_path)
    (folder / INDEX).write_text(index)
    with pytest.raises(DataError, match=r"index.json"):
        Shards.open(folder)


def test_edited_index_is_refused(shards, tmp_path):
    folder = damaged(shards, tmp_path)
    index = json.loads((folder / INDEX).read_text())
    index["tokenizer_sha256"] = "0" * 64
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(DataError, match="checksum"):
        Shards.open(folder)


@pytest.mark.parametrize("name", [INDEX, DOCUMENTS, "tokens-00002.bin"])
def test_missing_files_are_named(shards, tmp_path, name):
    folder = damaged(shards, tmp_path)
    (folder / name).unlink()
    with pytest.raises(DataError, match=name):
        Shards.open(folder)


def test_failed_writing_leaves_nothing(tmp_path, byte_tokenizer):
    def failing():
        yield "first"
        raise RuntimeError("the reader broke")

    with pytest.raises(RuntimeError):
        Shards.write(tmp_path / "s", failing(), byte_tokenizer)
    with pytest.raises(DataError, match="no documents"):
        Shards.write(tmp_path / "s", [], byte_tokenizer)
    assert list(tmp_path.iterdir()) == []
    first = Shards.write(tmp_path / "s", ["kept"], byte_tokenizer)
    with pytest.raises(DataError, match="exists already"):
        Shards.write(tmp_path / "s", ["new"], byte_tokenizer)
    assert Shards.open(tmp_path / "s").sha256 == first.sha256


@pytest.mark.parametrize("number", range(3))
def test_a_full_disk_leaves_nothing(tmp_path, byte_tokenizer, monkeypatch, number):
    """The n-th file cannot be flushed: one line, and the folder is as it was."""
    calls = []
    real = os.fsync

    def fsync(fd):
        calls.append(fd)
        if len(calls) > number:
            raise OSError(28, "No space left on device")
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(StorageError, match="the disk is full"):
        Shards.write(tmp_path / "s", ["text"], byte_tokenizer)
    assert list(tmp_path.iterdir()) == []


def test_tokens_outside_the_vocabulary_are_refused(tmp_path, byte_tokenizer):
    class Wrong(type(byte_tokenizer)):
        def encode(self, text, bos=False, eos=False):
            return [256, 512, 257]

    with pytest.raises(DataError, match="token 512 is outside"):
        Shards.write(tmp_path / "s", [Document("a", "a.txt")], Wrong())
    assert list(tmp_path.iterdir()) == []
