"""Text that a teacher writes itself."""

from __future__ import annotations

import json

import pytest

from herd.data.read_dialogs import rendered_dialogs
from herd.distill.own_words import user_opening, write_own_text
from herd.errors import DataError
from herd.llama import ModelConfig
from herd.llama.model import LlamaLM
from herd.text import Tokenizer

TEXT = "the quick brown fox jumps over the lazy dog. " * 50


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([TEXT], 540)


def make(tokenizer: Tokenizer, seed: int = 0) -> LlamaLM:
    config = ModelConfig(tokenizer.vocab_size, 16, 1, 2, 1, 24, max_context=1024)
    return LlamaLM(config).init_weights(seed, std=0.3).eval()


def test_the_opening_is_what_stands_before_a_users_words(tokenizer):
    opening = tokenizer.decode(user_opening(tokenizer.require_chat()))
    assert opening.endswith("<|start_header_id|>user<|end_header_id|>\n\n")


def test_dialogs_are_written_once_and_continued(tokenizer, tmp_path):
    calls = []

    def teacher() -> LlamaLM:
        calls.append(1)
        return make(tokenizer)

    write_own_text(teacher, tokenizer, tmp_path / "own", 3000, seed=0)
    files = sorted((tmp_path / "own").iterdir())
    dialogs = list(rendered_dialogs(tmp_path / "own" / "*.jsonl", tokenizer))
    assert sum(len(dialog.ids) for dialog in dialogs) >= 3000
    assert all(
        [m["role"] for m in json.loads(line)["messages"]] == ["user", "assistant"]
        for line in files[0].read_text().splitlines()
    )
    before = [path.read_bytes() for path in files]
    files[-1].unlink()
    write_own_text(teacher, tokenizer, tmp_path / "own", 3000, seed=0)
    assert [path.read_bytes() for path in files] == before
    rows = [json.loads(line) for line in files[0].read_text().split("\n")[:-1]]
    rows[0]["messages"][0]["content"] += "\u2028 \x85"  # ends of lines for `str.splitlines`
    files[0].write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    write_own_text(teacher, tokenizer, tmp_path / "own", 3000, seed=0)
    assert len(calls) == 2


class Silent(LlamaLM):
    """A model that ends every turn at once."""

    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs) * 0 + 1


def test_a_teacher_that_says_nothing_is_refused(tokenizer, tmp_path):
    model = Silent(make(tokenizer).config).eval()
    model.lm_head.weight.data.zero_()
    model.lm_head.weight.data[tokenizer.eos_id] = 10
    with pytest.raises(DataError, match="nothing that can be used"):
        write_own_text(lambda: model, tokenizer, tmp_path / "own", 100, seed=0)
