"""Pruning: what is cut must be what matters least, and what is kept must compute the same."""

from __future__ import annotations

import pytest
import torch

from herd.data.batch import Batch
from herd.distill import Importance, best_block, importance, prune
from herd.distill.importance import uniform_layers
from herd.errors import ConfigError
from herd.llama import ModelConfig
from herd.llama.model import LlamaLM
from herd.train.heldout import heldout_loss

TEACHER = ModelConfig(vocab_size=97, dim=32, n_layers=4, n_heads=4, n_kv_heads=2, ffn_dim=48, head_dim=8)


def make_batch(seed: int = 0, rows: int = 3, time: int = 11) -> Batch:
    tokens = torch.randint(0, 97, (rows, time + 1), generator=torch.Generator().manual_seed(seed))
    return Batch(tokens_BT=tokens[:, :-1], targets_BT=tokens[:, 1:], positions_BT=None, documents_BT=None)


@pytest.fixture
def teacher() -> LlamaLM:
    return LlamaLM(TEACHER).init_weights(1, std=0.3).requires_grad_(False)


@pytest.mark.parametrize("biased", [False, True])
def test_a_dead_structure_is_cut_and_the_function_stays(biased: bool) -> None:
    """Silence some neurons and channels exactly. Pruning must find them and lose nothing."""
    config = TEACHER.replace(attention_bias=biased, mlp_bias=biased)
    teacher = LlamaLM(config).init_weights(1, std=0.3).requires_grad_(False)
    for name, param in teacher.named_parameters():
        if name.endswith(".bias"):
            param.normal_(std=0.3, generator=torch.Generator().manual_seed(len(name)))
    dead_channels, dead_neurons = [3, 17, 30, 31], [0, 5, 40, 47]
    with torch.no_grad():
        for name, param in teacher.named_parameters():
            if name.endswith(
                ("embed_tokens.weight", "lm_head.weight", "q_proj.weight", "k_proj.weight", "v_proj.weight")
            ):
                param[:, dead_channels] = 0
            if name.endswith(("gate_proj.weight", "up_proj.weight")):
                param[:, dead_channels] = 0
            if "gate_proj" in name or "up_proj" in name:
                param[dead_neurons] = 0
            if "o_proj" in name or "down_proj" in name:
                param[dead_channels] = 0
    batch = make_batch()
    student, kept = prune(teacher, config.replace(dim=28, ffn_dim=44), [batch])
    assert not set(kept.channels.tolist()) & set(dead_channels)
    assert all(not set(n.tolist()) & set(dead_neurons) for n in kept.neurons)
    # RMSNorm divides by the mean over D channels: with dead ones gone the mean is 32/28 of what it was.
    for name, param in student.named_parameters():
        if "norm" in name:
            param.data *= (32 / 28) ** 0.5
    torch.testing.assert_close(
        student.logits(batch.tokens_BT), teacher.logits(batch.tokens_BT), rtol=1e-3, atol=1e-3
    )


def test_heads_are_ranked_inside_their_group(teacher: LlamaLM) -> None:
    scores = importance(teacher, [make_batch()])
    student, kept = prune(teacher, TEACHER.replace(n_heads=2), [make_batch()])
    for layer, heads in enumerate(kept.heads):
        for group, head in enumerate(heads.tolist()):
            assert head // 2 == group
            assert scores.heads_LH[layer, head] == scores.heads_LH[layer, group * 2 : group * 2 + 2].max()
    assert student.logits(make_batch().tokens_BT).shape == (3, 11, 97)


def test_importance_equals_a_hand_computation(teacher: LlamaLM) -> None:
    batch = make_batch()
    seen: list[torch.Tensor] = []
    handle = teacher.model.layers[2].mlp.down_proj.register_forward_pre_hook(
        lambda _, args: seen.append(args[0])
    )
    scores = importance(teacher, [batch, batch])
    handle.remove()
    expected = (2 * seen[0].abs().mean(1).square().sum(0)).sqrt()
    torch.testing.assert_close(scores.neurons_LF[2], expected)


def test_a_layer_without_effect_is_dropped_first(teacher: LlamaLM) -> None:
    with torch.no_grad():
        teacher.model.layers[2].self_attn.o_proj.weight.zero_()
        teacher.model.layers[2].mlp.down_proj.weight.zero_()
    batch = make_batch()
    # Train-free check: the loss is the same without layer 2, so it wins unless another removal *helps* a
    # random model.
    drop = best_block(teacher, 1, [batch])
    student, kept = prune(teacher, TEACHER.replace(n_layers=3), [batch])
    assert list(drop) == [i for i in range(4) if i not in kept.layers]
    assert heldout_loss(student, [batch]) <= heldout_loss(teacher, [batch]) + 1e-4


@pytest.mark.parametrize(
    "change, word",
    [
        ({"dim": 64}, "exceeds the teacher"),
        ({"vocab_size": 98}, "vocab_size"),
        ({"n_layers": 1}, "first and the last"),
    ],
)
def test_impossible_targets_are_refused(teacher: LlamaLM, change: dict, word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        prune(teacher, TEACHER.replace(**change), [make_batch()])


def test_the_minitron_4b_shapes_have_the_published_parameter_counts() -> None:
    """Llama-3.1-Minitron-4B: width 4.51 B, depth 4.54 B parameters (arXiv 2408.11796)."""
    from herd.llama import SIZES

    assert round(SIZES["8B"].replace(dim=3072, ffn_dim=9216).n_params / 1e9, 2) == 4.51
    assert round(SIZES["8B"].replace(n_layers=16).n_params / 1e9, 2) == 4.54


def slow_importance(model: LlamaLM, batches: list[Batch]) -> dict[str, torch.Tensor]:
    """Compute the scores token by token, with the layers' formulas written out."""
    import torch.nn.functional as F

    c = model.config
    heads = torch.zeros(c.n_layers, c.n_heads, dtype=torch.float64)
    neurons = torch.zeros(c.n_layers, c.ffn_dim, dtype=torch.float64)
    channels = torch.zeros(c.dim, dtype=torch.float64)
    for batch in batches:
        for tokens in batch.tokens_BT:
            counted = range(len(tokens))
            rows: dict[str, list[torch.Tensor]] = {}
            seen = []
            for layer in model.model.layers:
                seen.append(layer.self_attn.o_proj.register_forward_pre_hook(
                    lambda m, a, r=rows: r.setdefault("attention", []).append(a[0][0].double())))  # fmt: skip
            model(tokens[None])
            for handle in seen:
                handle.remove()
            x = model.model.embed_tokens(tokens).double()
            norms = []
            for index, layer in enumerate(model.model.layers):

                def norm(x, module):
                    return (
                        x / (x.square().mean(-1, keepdim=True) + c.norm_eps).sqrt() * module.weight.double()
                    )

                norms.append(norm(x, layer.input_layernorm))
                attended = rows["attention"][index]
                for h in range(c.n_heads):
                    size = [attended[t, h * c.head_dim : (h + 1) * c.head_dim].norm() for t in counted]
                    heads[index, h] += (sum(size) / len(counted)) ** 2
                x = x + attended @ layer.self_attn.o_proj.weight.double().T
                norms.append(norm(x, layer.post_attention_layernorm))
                gate, up = (
                    norms[-1] @ getattr(layer.mlp, n).weight.double().T for n in ("gate_proj", "up_proj")
                )
                inner = F.silu(gate) * up
                neurons[index] += (sum(inner[t].abs() for t in counted) / len(counted)) ** 2
                x = x + inner @ layer.mlp.down_proj.weight.double().T
            norms.append(norm(x, model.model.norm))
            for values in norms:
                channels += (sum(values[t].abs() for t in counted) / len(counted)) ** 2
    return {"heads_LH": heads.sqrt(), "neurons_LF": neurons.sqrt(), "channels_D": channels.sqrt()}


@torch.no_grad()
def test_importance_is_that_of_a_slow_obvious_implementation(teacher: LlamaLM) -> None:
    batches = [make_batch(0), make_batch(1)]
    fast = importance(teacher, batches)
    for name, slow in slow_importance(teacher, batches).items():
        torch.testing.assert_close(getattr(fast, name).double(), slow, rtol=1e-4, atol=1e-5)


def test_the_best_block_is_found_by_trying_all(teacher: LlamaLM) -> None:
    batch = make_batch()
    losses = {}
    for start in (1, 2):
        layers = [i for i in range(4) if i != start]
        student = LlamaLM(TEACHER.replace(n_layers=3))
        weights = {}
        for name, weight in teacher.state_dict().items():
            part = name.split(".")
            if part[1] == "layers":
                if int(part[2]) not in layers:
                    continue
                part[2] = str(layers.index(int(part[2])))
            weights[".".join(part)] = weight
        student.load_state_dict(weights)
        losses[start] = heldout_loss(student, [batch])
    assert best_block(teacher, 1, [batch]).start == min(losses, key=losses.__getitem__)


@pytest.mark.parametrize(
    "n, drop, expected", [(10, 0, []), (10, 4, [2, 4, 6, 8]), (30, 4, [4, 11, 18, 25]), (4, 2, [1, 2])]
)
def test_uniform_layers_are_spread_and_leave_the_ends(n: int, drop: int, expected: list[int]) -> None:
    assert uniform_layers(n, drop) == expected


def test_the_minitron_shapes_are_pruned_on_the_meta_device() -> None:
    """Cut the real 8B without allocating it: every tensor has the student's shape."""
    from herd.distill.prune import choose, cut
    from herd.llama import SIZES

    big = SIZES["8B"]
    model = LlamaLM.on_meta(big)
    for target, drop, billions in (
        (big.replace(dim=3072, ffn_dim=9216), range(0), 4.51),
        (big.replace(n_layers=16), range(15, 31), 4.54),
    ):
        scores = Importance(torch.rand(32, 32), torch.rand(32, 14336), torch.rand(4096))
        mask = choose(big, target, scores, drop)
        student = cut(model, target, mask)
        assert round(sum(p.numel() for p in student.parameters()) / 1e9, 2) == billions
