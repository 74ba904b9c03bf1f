"""Adapters on disk against PEFT on the same weights, both ways, and as llama.cpp's GGUF adapter."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from herd import checkpoint
from herd.checkpoint.adapters import export_gguf_adapter, read_adapter, save_adapter
from herd.cli.serve import put_adapters
from herd.errors import CheckpointError
from herd.llama.config import ModelConfig
from herd.llama.lora import add_lora, lora_layers, merged_parameter, scale_of
from herd.llama.model import LlamaLM
from herd.tune.merge import export_adapter

CONFIG = ModelConfig(vocab_size=96, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=48, max_context=64)
TOKENS = torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(0))


def trained(model: LlamaLM, rank: int = 4, *, rslora: bool = False, dora: bool = False) -> LlamaLM:
    """A model with an adapter whose B is not zero, and whose magnitudes are not the rows' lengths."""
    add_lora(model, rank, scale_of(rank, 16, rslora=rslora), dora=dora)
    torch.manual_seed(1)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B.normal_(std=0.05)
            if layer.lora_magnitude is not None:
                layer.lora_magnitude *= torch.empty_like(layer.lora_magnitude).uniform_(0.8, 1.2)
    return model


@pytest.fixture
def base(tmp_path):
    checkpoint.save_model(tmp_path / "base", LlamaLM(CONFIG).init_weights(0, std=0.1))
    return tmp_path / "base"


def logits(model: LlamaLM) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(TOKENS)


KINDS = [{}, {"rslora": True}, {"dora": True}, {"rslora": True, "dora": True}]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_peft_computes_the_same_from_our_folder(base, tmp_path, kind):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    model = trained(checkpoint.load_model(base), **kind)
    save_adapter(tmp_path / "adapter", model, str(base), rslora=kind.get("rslora", False))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["lora_alpha"] == 16
    assert {name: config[f"use_{name}"] for name in kind} == kind
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(logits(model), theirs(TOKENS).logits, atol=1e-5, rtol=0)
    merged = theirs.merge_and_unload().state_dict()
    for name, _ in CONFIG.param_shapes():
        torch.testing.assert_close(merged_parameter(model, name), merged[name], atol=1e-6, rtol=0)
    assert not torch.allclose(logits(model), logits(checkpoint.load_model(base)), atol=1e-2)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_folder_that_peft_wrote_computes_the_same_here(base, tmp_path, kind):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = peft.LoraConfig(
        r=6, lora_alpha=12, target_modules=["q_proj", "v_proj", "down_proj"],
        alpha_pattern={"down_proj": 7}, task_type="CAUSAL_LM", **{f"use_{name}": True for name in kind},
    )  # fmt: skip
    theirs = peft.get_peft_model(theirs, config).eval()
    torch.manual_seed(2)
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
        if "magnitude" in name:
            parameter.data *= torch.empty_like(parameter).uniform_(0.8, 1.2)
    theirs.save_pretrained(tmp_path / "adapter")
    model = checkpoint.load_model(tmp_path / "adapter")  # the folder names its base
    with torch.no_grad():
        torch.testing.assert_close(logits(model), theirs(TOKENS).logits, atol=1e-5, rtol=0)
    assert checkpoint.load_config(tmp_path / "adapter") == checkpoint.load_config(base)


def test_saving_and_loading_changes_no_bit(base, tmp_path):
    model = trained(checkpoint.load_model(base))
    save_adapter(tmp_path / "adapter", model, "base")  # relative to the adapter's folder
    (tmp_path / "base").rename(tmp_path / "adapter" / "base")
    again = checkpoint.load_model(tmp_path / "adapter")
    assert torch.equal(logits(model), logits(again))


def test_doras_gradients_are_pefts(base, tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    ours = trained(checkpoint.load_model(base), dora=True)
    save_adapter(tmp_path / "adapter", ours, str(base))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter", is_trainable=True)
    ours.logits(TOKENS).square().mean().backward()
    theirs(TOKENS).logits.square().mean().backward()
    expected = {
        name.removeprefix("base_model.model.").replace(".default", "").removesuffix(".weight"): p.grad
        for name, p in theirs.named_parameters()
        if p.grad is not None
    }
    for name, layer in lora_layers(ours).items():
        for part, peft_name in (("A", "lora_A"), ("B", "lora_B"), ("magnitude", "lora_magnitude_vector")):
            grad = getattr(layer, f"lora_{part}").grad
            torch.testing.assert_close(grad, expected[f"{name}.{peft_name}"], atol=1e-5, rtol=1e-4)


def test_doras_lengths_follow_the_update_also_after_an_evaluation_in_inference_mode(base):
    model = trained(checkpoint.load_model(base), dora=True)
    with torch.inference_mode():
        model.logits(TOKENS)
    model.logits(TOKENS).mean().backward()
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B += 0.1
    merged = LlamaLM(CONFIG)
    for name, _ in CONFIG.param_shapes():
        merged.get_parameter(name).data = merged_parameter(model, name)
    torch.testing.assert_close(logits(model), logits(merged), atol=1e-4, rtol=0)


def test_dora_is_refused_where_it_cannot_be_written_or_served(base, tmp_path):
    save_adapter(tmp_path / "adapter", trained(checkpoint.load_model(base), dora=True), str(base))
    with pytest.raises(CheckpointError, match=r"GGUF adapter has no DoRA .*\(herd tune merge\)"):
        export_adapter(tmp_path / "adapter", tmp_path / "adapter.gguf")
    assert not (tmp_path / "adapter.gguf").exists()
    with pytest.raises(CheckpointError, match="several adapters has no DoRA"):
        put_adapters(checkpoint.load_model(base), {"mine": tmp_path / "adapter"})


def test_an_adapter_of_another_model_is_refused(base, tmp_path):
    wide = LlamaLM(CONFIG.replace(ffn_dim=64)).init_weights(0)
    save_adapter(tmp_path / "adapter", trained(wide), str(base))
    with pytest.raises(CheckpointError, match="belongs to another base model"):
        checkpoint.load_model(tmp_path / "adapter")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "lacks the lora_magnitude_vector of DoRA"),
        ({"peft_type": "IA3"}, "peft_type='IA3' is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"base_model_name_or_path": None}, "does not name the base model"),
    ],
)
def test_other_kinds_of_adapters_are_refused_by_name(base, tmp_path, change, message):
    save_adapter(tmp_path / "adapter", trained(checkpoint.load_model(base)), str(base))
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load_model(tmp_path / "adapter")


def test_damaged_adapters_are_refused(base, tmp_path):
    save_adapter(tmp_path / "adapter", trained(checkpoint.load_model(base)), str(base))
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name] * float("nan")}, file)
    with pytest.raises(CheckpointError, match="not finite"):
        read_adapter(tmp_path / "adapter")
    save_file({key: value for key, value in tensors.items() if key != name}, file)
    with pytest.raises(CheckpointError, match="lacks one of lora_A and lora_B"):
        read_adapter(tmp_path / "adapter")
    file.write_bytes(b"x")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_adapter(tmp_path / "adapter")


def test_a_gguf_adapter_has_llama_cpps_names_shapes_and_order_of_rows(base, tmp_path):
    from gguf import GGUFReader

    model = trained(checkpoint.load_model(base))
    export_gguf_adapter(tmp_path / "adapter.gguf", model, "test")
    reader = GGUFReader(tmp_path / "adapter.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items() if name.startswith("a")}
    assert fields == {"adapter.type": "lora", "adapter.lora.alpha": 16.0}
    tensors = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    assert len(tensors) == 2 * 7 * CONFIG.n_layers
    layer = lora_layers(model)["model.layers.1.self_attn.q_proj"]
    assert torch.equal(tensors["blk.1.attn_q.weight.lora_a"], layer.lora_A.detach())
    # llama.cpp's order: neighbours rotate together, so Herd's rows (i, i + K/2) of a head interleave
    K = CONFIG.head_dim
    rows = [head * K + half * K // 2 + i for head in range(4) for i in range(K // 2) for half in range(2)]
    assert torch.equal(tensors["blk.1.attn_q.weight.lora_b"], layer.lora_B.detach()[rows])
    down = lora_layers(model)["model.layers.0.mlp.down_proj"].lora_B.detach()
    assert torch.equal(tensors["blk.0.ffn_down.weight.lora_b"], down)
