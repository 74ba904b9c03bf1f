"""Adapters on disk against PEFT on the same weights, both ways, and as llama.cpp's GGUF adapter."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from herd import checkpoint
from herd.checkpoint.adapters import export_gguf_adapter, read_adapter, save_adapter
from herd.errors import CheckpointError
from herd.llama.config import ModelConfig
from herd.llama.lora import add_lora, lora_layers, merged_parameter, scale_of
from herd.llama.model import LlamaLM

CONFIG = ModelConfig(vocab_size=96, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=48, max_context=64)
TOKENS = torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(0))


def trained(model: LlamaLM, rank: int = 4, **choices) -> LlamaLM:
    """A model with an adapter whose B is not zero."""
    add_lora(model, rank, scale_of(rank, 16), **choices)
    torch.manual_seed(1)
    for layer in lora_layers(model).values():
        layer.lora_B.data.normal_(std=0.05)
    return model


@pytest.fixture
def base(tmp_path):
    checkpoint.save_model(tmp_path / "base", LlamaLM(CONFIG).init_weights(0, std=0.1))
    return tmp_path / "base"


def logits(model: LlamaLM) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(TOKENS)


def test_peft_computes_the_same_from_our_folder(base, tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    model = trained(checkpoint.load_model(base))
    save_adapter(tmp_path / "adapter", model, str(base))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(logits(model), theirs(TOKENS).logits, atol=1e-5, rtol=0)
    merged = theirs.merge_and_unload().state_dict()
    for name, _ in CONFIG.param_shapes():
        torch.testing.assert_close(merged_parameter(model, name), merged[name], atol=1e-6, rtol=0)
    assert not torch.allclose(logits(model), logits(checkpoint.load_model(base)), atol=1e-2)


@pytest.mark.parametrize("rslora", [False, True])
def test_a_folder_that_peft_wrote_computes_the_same_here(base, tmp_path, rslora):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = peft.LoraConfig(
        r=6, lora_alpha=12, target_modules=["q_proj", "v_proj", "down_proj"], use_rslora=rslora,
        alpha_pattern={"down_proj": 7}, task_type="CAUSAL_LM",
    )  # fmt: skip
    theirs = peft.get_peft_model(theirs, config).eval()
    torch.manual_seed(2)
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
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


def test_an_adapter_of_another_model_is_refused(base, tmp_path):
    wide = LlamaLM(CONFIG.replace(ffn_dim=64)).init_weights(0)
    save_adapter(tmp_path / "adapter", trained(wide), str(base))
    with pytest.raises(CheckpointError, match="belongs to another base model"):
        checkpoint.load_model(tmp_path / "adapter")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora=True is not supported"),
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
