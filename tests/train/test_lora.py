"""Adapters in the one loop: gradients against dense ones in float64, small states, resuming, packed bases."""

import json

import pytest
import torch
import toy

from herd import checkpoint
from herd.data.batch import Batch
from herd.errors import ConfigError, RecipeError
from herd.llama.config import ModelConfig
from herd.llama.lora import LoraLinear, add_lora, lora_layers, merged_parameter, scale_of
from herd.llama.model import LlamaLM
from herd.quant import scheme
from herd.quant.linear import swap_linears, use_exact_products
from herd.text import Tokenizer
from herd.train import lm, train
from herd.train.adapters import AdapterSection
from herd.train.objectives import batch_loss
from herd.train.recipe import parse_recipe
from herd.train.run import run_recipe

pytestmark = pytest.mark.filterwarnings("ignore::herd.data.text_files.DataWarning")
WIDE = ModelConfig(vocab_size=96, dim=64, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=96, max_context=64)


def adapted(model: LlamaLM, rank: int = 4) -> LlamaLM:
    add_lora(model, rank, scale_of(rank, 8))
    torch.manual_seed(3)
    for layer in lora_layers(model).values():
        layer.lora_B.data.normal_(std=0.1)
    return model


def batch(seed: int = 0) -> Batch:
    tokens = torch.randint(0, 96, (2, 33), generator=torch.Generator().manual_seed(seed))
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())


def gradients(model: LlamaLM) -> dict[str, torch.Tensor]:
    batch_loss(model, lm, batch()).total.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert all("lora_" in name for name in grads)
    return grads


def test_gradients_are_those_of_the_merged_weights_by_the_chain_rule():
    model = adapted(toy.model()).double()
    grads = gradients(model)
    merged = toy.model().double()
    for name, _ in merged.config.param_shapes():
        merged.get_parameter(name).data = merged_parameter(model, name, torch.float64)
    batch_loss(merged, lm, batch()).total.backward()
    for name, layer in lora_layers(model).items():
        dense = merged.get_parameter(f"{name}.weight").grad
        torch.testing.assert_close(grads[f"{name}.lora_A"], layer.scale * layer.lora_B.T @ dense)
        torch.testing.assert_close(grads[f"{name}.lora_B"], layer.scale * dense @ layer.lora_A.T)


@pytest.mark.parametrize("name", ["q4", "q8"])
def test_gradients_through_packed_blocks_are_those_on_the_unpacked_weights(name):
    packed = swap_linears(LlamaLM(WIDE).init_weights(0, std=0.1), scheme(name))
    plain = LlamaLM(WIDE).double()
    for parameter, _ in WIDE.param_shapes():
        plain.get_parameter(parameter).data = merged_parameter(packed, parameter, torch.float64)
    use_exact_products(packed)
    exact = gradients(adapted(plain).double())
    found = gradients(adapted(packed))
    assert found.keys() == exact.keys()
    for key, grad in exact.items():
        assert float((found[key] - grad).norm() / grad.norm()) < 1e-3, key


def test_backward_through_packed_blocks_keeps_no_unpacked_weights():
    model = swap_linears(LlamaLM(WIDE).init_weights(0), scheme("q8"))
    use_exact_products(model)
    adapted(model)
    kept: list[int] = []
    n_weights = WIDE.dim * WIDE.ffn_dim

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(batch().tokens_BT[:1, :8])
    assert kept
    assert max(kept) < n_weights


def test_any_integer_is_a_seed():
    linear = torch.nn.Linear(4, 4)
    first, again, other = (
        LoraLinear(linear, 2, 1.0, seed).lora_A for seed in (2**70 + 3, 2**70 + 3, 2**70 + 4)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_head_can_be_adapted_too():
    model = toy.model()
    add_lora(model, 2, 1.0, ["lm_head"])
    assert set(gradients(model)) == {"lm_head.lora_A", "lm_head.lora_B"}


def test_unknown_targets_and_too_large_ranks_are_refused():
    with pytest.raises(ConfigError, match="'wq' is not one of q_proj"):
        add_lora(toy.model(), 2, 1.0, ["wq"])
    with pytest.raises(ConfigError, match="rank=40 exceeds"):
        add_lora(toy.model(), 40, 1.0)


def test_a_state_has_only_the_adapters_and_a_resumed_run_ends_with_the_same_bits(tmp_path):
    def start() -> LlamaLM:
        return add_lora(toy.model(), 4, 2.0)

    class Stop(Exception):
        pass

    def stop(record):
        if record["step"] == 4:
            raise Stop

    whole, parts = start(), start()
    train(whole, toy.Counting(), lm, toy.config(), tmp_path / "whole")
    with pytest.raises(Stop):
        train(parts, toy.Counting(), lm, toy.config(save_every=2), tmp_path / "parts", on_step=stop)
    again = start()
    result = train(again, toy.Counting(), lm, toy.config(save_every=2), tmp_path / "parts")
    assert result.resumed_from == 2
    assert toy.bits(again) == toy.bits(whole)
    assert toy.base_bits(again) == toy.bits(toy.model())
    state = next((tmp_path / "whole" / "state").glob("step-*"))
    names = json.dumps([path.read_bytes().decode("latin1") for path in state.iterdir()])
    assert "lora_A" in names
    assert "embed_tokens" not in names


RECIPE = """\
name: tuned
model: {{start: {base}}}
adapter: {{rank: 4, {adapter}}}
data: {{kind: dialogs, path: {folder}/dialogs.jsonl}}
objective: {{kind: sft}}
optimizer: {{kind: adamw, lr: 1e-2, weight_decay: 0}}
train: {{steps: 4, batch_size: 2, context: 64{train}}}
out: {folder}/run
"""


@pytest.fixture
def base(tmp_path):
    tokenizer = Tokenizer.train(["ab cd " * 50], 515)
    config = WIDE.replace(vocab_size=tokenizer.vocab_size)
    checkpoint.save_model(tmp_path / "base", LlamaLM(config).init_weights(0), tokenizer)
    dialog = {"messages": [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}]}
    (tmp_path / "dialogs.jsonl").write_text("".join(json.dumps(dialog) + "\n" for _ in range(8)))
    return tmp_path / "base"


def recipe(base, adapter="", train=""):
    return parse_recipe(RECIPE.format(base=base, folder=base.parent, adapter=adapter, train=train), "test")


@pytest.mark.parametrize("kind", ["", "rslora: true, dora: true"])
def test_a_recipe_trains_an_adapter_that_loads_with_its_base(base, kind):
    folder, _ = run_recipe(recipe(base, kind))
    assert folder == base.parent / "run" / "adapter"
    model = checkpoint.load_model(folder)
    before = checkpoint.load_model(base)
    tokens = batch().tokens_BT
    with torch.no_grad():
        assert not torch.allclose(model.logits(tokens), before.logits(tokens), atol=1e-3)
    for layer in lora_layers(model).values():
        assert layer.scale == (16 if kind else 8)
        assert (layer.lora_magnitude is not None) == bool(kind)
        if layer.lora_magnitude is not None:
            assert not torch.equal(layer.lora_magnitude, layer.base.weight.norm(dim=1))
    assert toy.base_bits(model) == toy.bits(before)
    assert checkpoint.load_tokenizer(folder) == checkpoint.load_tokenizer(base)
    assert checkpoint.load_lineage(folder).parents == {"start": checkpoint.checkpoint_hash(base)}


def test_packed_training_needs_a_packed_model_and_leaves_its_blocks(base):
    with pytest.raises(RecipeError, match="herd quantize"):
        run_recipe(recipe(base, "packed: true"))
    source = checkpoint.open_source(base)
    checkpoint.quantize_folder(source, base.parent / "packed", scheme("q8"))
    folder, result = run_recipe(
        recipe(base.parent / "packed", "packed: true", ", dtype: bf16, activation_checkpointing: true")
    )
    assert result.step == 4
    model = checkpoint.load_model(folder)
    assert max(float(layer.lora_B.detach().abs().max()) for layer in lora_layers(model).values()) > 0


def test_another_base_is_refused_on_resume(base):
    from herd.errors import DataError

    run_recipe(recipe(base))
    config = checkpoint.load_config(base)
    checkpoint.save_model(base, LlamaLM(config).init_weights(1), checkpoint.load_tokenizer(base))
    with pytest.raises(DataError, match=r"the start model"):
        run_recipe(recipe(base))


def test_layers_are_read_in_the_compute_dtype_and_the_rest_in_fp32(tmp_path):
    checkpoint.save_model(tmp_path / "base", toy.model(), dtype=torch.bfloat16)
    model = AdapterSection(rank=2).load(str(tmp_path / "base"), 0, torch.bfloat16, torch.device("cpu"))
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert {dtypes[name] for name in dtypes if name.endswith("base.weight")} == {torch.bfloat16}
    assert {dtypes[name] for name in dtypes if "base" not in name} == {torch.float32}
