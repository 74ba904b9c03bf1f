"""How much of a dialog fits in memory, and what is said when the model does not."""

from pathlib import Path

import pytest
import torch

from herd.checkpoint import ModelSource, save_model
from herd.cli import chat_memory
from herd.cli.chat_memory import OVERHEAD, _cure, plan_context
from herd.errors import CheckpointError
from herd.llama.config import SIZES, ModelConfig
from herd.llama.model import LlamaLM
from herd.quant import scheme
from herd.quant.random import random_quantized

CONFIG = ModelConfig(512, 256, 2, 4, 4, 512, max_context=65_536)
PLAIN = CONFIG.nbytes(4)
PER_TOKEN = 2 * 2 * 4 * 64  # values of keys and values in two layers of four heads of 64


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "plain"
    save_model(folder, LlamaLM(CONFIG).init_weights(0), dtype=torch.bfloat16)
    return folder


@pytest.fixture
def free(monkeypatch):
    """Set the memory that is free, in bytes besides the fixed overhead."""

    def set(nbytes):
        monkeypatch.setattr(chat_memory, "available_memory", lambda: int(OVERHEAD + nbytes))

    return set


def test_the_whole_context_is_used_where_it_fits(plain, free, capsys):
    free(PLAIN + 4 * PER_TOKEN * 65_536)
    assert plan_context(ModelSource(plain), "fp32", "cpu", "auto", None) == 65_536
    assert plan_context(ModelSource(plain), "fp32", "cpu", "auto", 100) == 100
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("kv", "dtype", "nbytes"), [("auto", "fp32", 4), ("auto", "bf16", 2), ("bf16", "fp32", 2)]
)
def test_a_dialog_is_limited_to_what_fits_and_a_line_says_so(plain, free, capsys, kv, dtype, nbytes):
    free(CONFIG.nbytes(4 if dtype == "fp32" else 2) + nbytes * PER_TOKEN * 10_000)
    limit = plan_context(ModelSource(plain), dtype, "cpu", kv, None)
    assert 9_900 < limit <= 10_000
    err = capsys.readouterr().err
    assert err.startswith(f"context limited to {limit:,} of 65,536 tokens, as memory allows")
    assert err.count("\n") == 1


def test_what_does_not_fit_names_what_would(plain, free, tmp_path):
    def refused(reason, kv="auto", asked=None):
        with pytest.raises(CheckpointError, match=reason) as error:
            plan_context(ModelSource(plain), "fp32", "cpu", kv, asked)
        assert "\n" not in str(error.value)

    free(PLAIN + 4 * PER_TOKEN * 3_000)
    refused("for 30,000 tokens do not fit in .*; --context 29[0-9][0-9] would fit", asked=30_000)
    free(PLAIN + 4 * PER_TOKEN * 1_000)
    refused("--kv int8 would fit")
    free(PLAIN * 0.9 + 1.1 * PER_TOKEN * 2_048)
    refused(r"herd quantize .* --to Q8_0 \([\d.]+ MB\) would fit", kv="int8")
    free(100_000)
    refused("herd chat smollm2-135m would fit|close programs")


@pytest.mark.parametrize("gb, name", [(1.2, "tinyllama"), (4, "llama3.2-3b"), (10, "llama3.1-8b")])
def test_a_model_that_fits_in_no_format_is_replaced_by_the_largest_that_runs_from_its_file(gb, name):
    cure = _cure(SIZES["405B"], Path("llama"), 10**12, 10**9, int(gb * 1e9), "bf16", 2048)
    assert cure == f"herd chat {name} would fit"


def test_a_quantized_model_takes_the_size_of_its_file(tmp_path, free):
    folder = tmp_path / "packed"
    save_model(folder, random_quantized(CONFIG, scheme("q4")))
    free((folder / "model.gguf").stat().st_size + 2 * PER_TOKEN * 5_000)
    assert 4_900 < plan_context(ModelSource(folder), "fp32", "cpu", "auto", None) <= 5_000
