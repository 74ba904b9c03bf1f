"""Prompts that a restarted engine finds again, and damaged or foreign files that it does not use."""

import errno
import os
import stat
import threading

import pytest
import torch

from herd.engine import Engine, EngineLoop, Request, Sampling
from herd.engine import saved_pages as module
from herd.errors import StorageError
from herd.kernels.page_layout import PAGE


@pytest.fixture(scope="module")
def wide(make_model):
    return make_model(seed=7, dim=64, n_heads=2, n_kv_heads=1, head_dim=32, ffn_dim=96)


PROMPT = [(7 * i) % 250 for i in range(4 * PAGE + 10)]


def ask(loop: EngineLoop, ids=PROMPT, tenant: str = "") -> tuple[list[int], int]:
    """Return an answer, and the number of prompt tokens that came from the cache."""
    generation = loop.submit(Request(ids, Sampling(max_tokens=8), tenant=tenant))[0]
    return generation.completion().ids, generation.usage.cached_tokens


def files(folder) -> list:
    return sorted(folder.glob("*/*.page"), key=lambda file: file.stat().st_mtime_ns)


@pytest.mark.parametrize("kv", ["fp32", "bf16", "int8"])
def test_a_restarted_engine_finds_its_prompts(wide, tmp_path, kv):
    with EngineLoop(Engine(wide, None, kv=kv), cache_folder=tmp_path) as loop:
        first = ask(loop)
        assert first[1] == 0
    assert len(files(tmp_path)) == 4
    assert stat.S_IMODE(files(tmp_path)[0].parent.stat().st_mode) == 0o700
    with EngineLoop(Engine(wide, None, kv=kv), cache_folder=tmp_path) as loop:
        assert ask(loop) == (first[0], 4 * PAGE)
        assert ask(loop, [*PROMPT[:100], 1, 2])[1] == PAGE
        assert ask(loop, tenant="another")[1] == 0
    assert len(files(tmp_path)) == 4 + 4 + 0


def test_an_answer_is_saved_when_the_next_prompt_contains_it(wide, tmp_path):
    with EngineLoop(Engine(wide, None), cache_folder=tmp_path) as loop:
        answer = loop.submit(Request(PROMPT, Sampling(max_tokens=PAGE)))[0].completion().ids
        ask(loop, [*PROMPT, *answer, 3])
    with EngineLoop(Engine(wide, None), cache_folder=tmp_path) as loop:
        assert ask(loop, [*PROMPT, *answer, 4])[1] == 5 * PAGE


def test_pages_of_other_weights_or_another_kind_are_not_used(wide, make_model, tmp_path):
    with EngineLoop(Engine(wide, None), cache_folder=tmp_path) as loop:
        ask(loop)
    changed = make_model(seed=7, dim=64, n_heads=2, n_kv_heads=1, head_dim=32, ffn_dim=96)
    with torch.no_grad():
        changed.model.layers[2].mlp.down_proj.weight[3, 4] += 1e-3
    for engine in (Engine(changed, None), Engine(wide, None, kv="bf16")):
        with EngineLoop(engine, cache_folder=tmp_path) as loop:
            assert ask(loop)[1] == 0


def flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda file, other: file.write_bytes(flip(file.read_bytes(), 1000)),
        lambda file, other: file.write_bytes(flip(file.read_bytes(), -1 % file.stat().st_size)),
        lambda file, other: file.write_bytes(file.read_bytes()[:-1]),
        lambda file, other: file.write_bytes(b""),
        lambda file, other: file.write_bytes(other.read_bytes()),  # another page under this name
        lambda file, other: file.rename(file.with_name("zz.page")),
    ],
)
def test_damaged_files_are_ignored_with_a_warning(wide, tmp_path, damage):
    with EngineLoop(Engine(wide, None), cache_folder=tmp_path) as loop:
        want = ask(loop)[0]
    last, *_, first = files(tmp_path)  # the first page of a prompt is deleted last
    damage(first, last)
    with pytest.warns(UserWarning, match="ignoring 1 damaged files"):
        loop = EngineLoop(Engine(wide, None), cache_folder=tmp_path)
    with loop:
        assert ask(loop) == (want, 0)
    with EngineLoop(Engine(wide, None), cache_folder=tmp_path) as loop:  # it was written again
        assert ask(loop) == (want, 4 * PAGE)


def test_the_folder_is_bounded_and_keeps_what_was_asked_for_last(wide, tmp_path):
    def engine() -> Engine:
        made = Engine(wide, None, cache_bytes=1)
        made.cache.pages.limit = 6
        return made

    prompts = [[n] * (2 * PAGE + 1) for n in range(5)]
    with EngineLoop(engine(), cache_folder=tmp_path) as loop:
        for ids in (*prompts, prompts[2]):
            ask(loop, ids)
    assert len(files(tmp_path)) == 6
    with EngineLoop(engine(), cache_folder=tmp_path) as loop:
        assert [ask(loop, ids)[1] for ids in (prompts[2], prompts[4])] == [2 * PAGE] * 2
        assert ask(loop, prompts[0])[1] == 0


def test_a_full_disk_costs_only_the_saving(wide, tmp_path, monkeypatch, caplog):
    def full(path, content):
        raise StorageError(f"{path}: {os.strerror(errno.ENOSPC)}")

    monkeypatch.setattr(module, "write_atomically", full)
    with EngineLoop(Engine(wide, None), cache_folder=tmp_path) as loop:
        assert ask(loop)[0] == ask(loop)[0]
    assert caplog.text.count("cached prompts are no longer saved") == 1
    assert files(tmp_path) == []


def test_a_slow_disk_leaves_pages_out_until_they_are_asked_for_again(wide, tmp_path, monkeypatch):
    engine = Engine(wide, None)
    monkeypatch.setattr(module, "PENDING_BYTES", 3 * engine.cache.page_bytes)
    write, is_asked = module.SavedPages._write, threading.Event()

    def write_later(*args):
        is_asked.wait(60)
        write(*args)

    monkeypatch.setattr(module.SavedPages, "_write", write_later)
    with EngineLoop(engine, cache_folder=tmp_path) as loop:
        ask(loop)
        while loop.engine.saved_pages._pending < module.PENDING_BYTES:
            pass
        is_asked.set()
        while loop.engine.saved_pages._pending:
            pass
        assert len(files(tmp_path)) == 3
        ask(loop)
    assert len(files(tmp_path)) == 4


def test_a_folder_that_cannot_be_made_is_refused(wide, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        EngineLoop(Engine(wide, None), cache_folder=tmp_path / "file" / "more")
