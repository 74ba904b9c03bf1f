"""Models with a trimmed vocabulary, and the teacher's predictions folded onto it."""

from __future__ import annotations

import pytest
import torch

from herd.distill.vocab import VocabCut, fold, trim_model
from herd.errors import ConfigError
from herd.llama import ModelConfig
from herd.llama.model import LlamaLM

CONFIG = ModelConfig(
    vocab_size=50, dim=16, n_layers=2, n_heads=2, n_kv_heads=1, ffn_dim=24, tie_embeddings=True
)


def make_cut() -> VocabCut:
    kept = torch.tensor(sorted(torch.randperm(50, generator=torch.Generator().manual_seed(0))[:30].tolist()))
    first = torch.randint(0, 30, (50,), generator=torch.Generator().manual_seed(1))
    first[kept] = torch.arange(30)
    return VocabCut(None, kept, first)  # type: ignore[arg-type]


@pytest.mark.parametrize("tied", [True, False])
def test_logits_of_kept_tokens_do_not_change(tied):
    cut = make_cut()
    teacher = LlamaLM(CONFIG.replace(tie_embeddings=tied)).init_weights(0, std=0.3)
    student = trim_model(teacher, cut)
    tokens = torch.randint(0, 30, (2, 9))
    torch.testing.assert_close(student.logits(tokens), teacher.logits(cut.kept_W[tokens])[..., cut.kept_W])
    assert student.config.n_params == teacher.config.n_params - 20 * 16 * (1 if tied else 2)
    assert (student.lm_head.weight is student.model.embed_tokens.weight) == tied


def test_folding_adds_every_dropped_token_to_its_first_piece_in_float64():
    cut = make_cut()
    p = torch.softmax(torch.randn(7, 50, dtype=torch.float64), -1)
    expected = torch.zeros(7, 30, dtype=torch.float64)
    for old in range(50):
        expected[:, cut.first_V[old]] += p[:, old]
    torch.testing.assert_close(fold(p, cut), expected)
    torch.testing.assert_close(fold(p, cut).sum(-1), torch.ones(7, dtype=torch.float64))


def test_a_cut_of_another_vocabulary_is_refused():
    with pytest.raises(ConfigError, match="trimmed for a model of 50"):
        trim_model(LlamaLM(CONFIG.replace(vocab_size=49)), make_cut())
