"""The export for vLLM, decoded by what the format says and, where it is installed, by compressed-tensors
itself."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open

from herd import checkpoint
from herd.checkpoint import journal, weights
from herd.checkpoint.vllm import packed_codes, quantization_config
from herd.cli import run
from herd.errors import CheckpointError, QuantError
from herd.quant import FORMATS, blocks, scheme
from herd.quant.linear import swap_linears

SHAPE = {"dim": 64, "n_heads": 2, "n_kv_heads": 1, "ffn_dim": 96, "head_dim": 0}


def stored(folder):
    out = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            out |= {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    return out


def unpack(codes_RP, scales_RN, bits):
    """As the format says: little-endian fields of ``bits`` bits, offset by half their range, times a group's
    scale."""
    fields = (codes_RP.numpy().view(np.uint32)[..., None] >> np.arange(0, 32, bits, dtype=np.uint32)) & (
        2**bits - 1
    )
    signed = fields.reshape(len(codes_RP), -1).astype(np.int64) - 2 ** (bits - 1)
    return torch.from_numpy(signed).float() * scales_RN.float().repeat_interleave(32, dim=1)


@pytest.mark.parametrize(("name", "bits"), [("Q4_0", 4), ("Q8_0", 8)])
def test_blocks_are_copied_bit_for_bit(name, bits):
    weight = torch.randn(7, 96, generator=torch.Generator().manual_seed(0))
    rows = blocks.encode(weight, FORMATS[name])
    codes, scales = packed_codes(rows, FORMATS[name])
    assert codes.shape == (7, 96 * bits // 32)
    assert torch.equal(unpack(codes, scales, bits), blocks.decode(rows, FORMATS[name]))


@pytest.mark.parametrize(("to", "bits"), [("q4", 4), ("q8", 8), (None, 4)])
@pytest.mark.parametrize("tied", [False, True])
def test_every_linear_layer_of_a_folder_is_packed(tmp_path, make_model, tokenizer, to, bits, tied):
    """The written tensors are those of the quantized model: every linear layer packed, and nothing else."""
    model = make_model(**SHAPE, tie_embeddings=tied)
    checkpoint.save_model(
        tmp_path / "a", model, tokenizer, lineage=checkpoint.Lineage(name="toy", stage="instruct")
    )
    source = tmp_path / "a"
    if to:
        source = tmp_path / "q"
        checkpoint.quantize_folder(checkpoint.ImportSource(tmp_path / "a"), source, scheme(to))
    found = checkpoint.export_vllm(source, tmp_path / "out", dtype=torch.float16)
    tensors = stored(tmp_path / "out")
    expected = swap_linears(
        model, scheme(to or "q4", embeddings=None if to else "f32", head=None if to else "f32")
    )
    seen = set()
    for name, shape in model.config.param_shapes():
        module = expected.get_submodule(name.removesuffix(".weight"))
        if name.endswith("_proj.weight"):
            assert tensors[f"{name}_shape"].tolist() == list(shape)
            ours = unpack(tensors[f"{name}_packed"], tensors[f"{name}_scale"], bits)
            assert torch.equal(ours, module.weight), name
            seen |= {f"{name}_{part}" for part in ("packed", "scale", "shape")}
        else:
            assert torch.equal(tensors[name], module.weight.half()), name
            seen.add(name)
    assert tensors.keys() == seen
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"] == quantization_config(bits)
    assert config.get("dtype", config.get("torch_dtype")) == "float16"
    lineage = checkpoint.load_lineage(tmp_path / "out")
    assert lineage.weights_hash == found
    assert lineage.stage == "instruct"
    assert list(lineage.parents.values()) == [checkpoint.load_lineage(source).weights_hash]
    assert checkpoint.load_tokenizer(source).encode("fox") == tokenizer.encode("fox")


def test_compressed_tensors_unpacks_the_same_weights(tmp_path, plain):
    package = pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    checkpoint.quantize_folder(checkpoint.ImportSource(plain), tmp_path / "q", scheme("q4"))
    checkpoint.export_vllm(tmp_path / "q", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    group = QuantizationConfig.model_validate(config).config_groups["group_0"]
    assert group.weights.num_bits == 4, package
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    tensors, model = stored(tmp_path / "out"), checkpoint.load_model(tmp_path / "q")
    for layer in ("self_attn.q_proj", "mlp.down_proj"):
        name = f"model.layers.1.{layer}"
        state = {f"weight_{p}": tensors[f"{name}.weight_{p}"] for p in ("packed", "scale", "shape")}
        state["weight_shape"] = torch.Size(state["weight_shape"].tolist())
        theirs = compressor.decompress(state, group)["weight"]
        torch.testing.assert_close(
            theirs.float(), model.get_submodule(name).weight, rtol=1e-3, atol=0
        )  # fp16 products


def test_other_formats_are_refused(tmp_path, plain, make_model):
    checkpoint.save_model(
        tmp_path / "wide", make_model(dim=256, ffn_dim=256, n_heads=2, n_kv_heads=1, head_dim=0)
    )
    checkpoint.quantize_folder(checkpoint.ImportSource(tmp_path / "wide"), tmp_path / "k", scheme("q4k"))
    with pytest.raises(
        QuantError, match=r"k: its linear layers are Q4_K; for vLLM all must be Q4_0 or all Q8_0"
    ):
        checkpoint.export_vllm(tmp_path / "k", tmp_path / "out")
    checkpoint.save_model(tmp_path / "narrow", make_model())
    with pytest.raises(QuantError, match=r"rows of 48 weights do not divide into Q4_0"):
        checkpoint.export_vllm(tmp_path / "narrow", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    checkpoint.export_vllm(plain, tmp_path / "out")
    with pytest.raises(CheckpointError):  # it is not a checkpoint of ours any more
        checkpoint.load_model(tmp_path / "out")


def test_an_export_stopped_within_a_layer_continues(tmp_path, plain, monkeypatch):
    monkeypatch.setattr(journal, "SAVE_EVERY", 1)
    add, count = journal.Journal.add, []

    def stop(self, *args):
        add(self, *args)
        count.append(1)
        if len(count) == 6:
            raise KeyboardInterrupt

    monkeypatch.setattr(journal.Journal, "add", stop)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.export_vllm(plain, tmp_path / "out")
    monkeypatch.setattr(journal.Journal, "add", add)
    found = checkpoint.export_vllm(plain, tmp_path / "out")
    assert found == checkpoint.export_vllm(plain, tmp_path / "whole")
    ours, theirs = stored(tmp_path / "out"), stored(tmp_path / "whole")
    assert all(torch.equal(weights.raw_bytes(ours[n]), weights.raw_bytes(theirs[n])) for n in theirs)


def test_the_command_line_exports_for_vllm(tmp_path, plain, capsys):
    assert run(["export", str(plain), str(tmp_path / "v"), "--format", "vllm", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "toy-w4a16"
    assert run(["export", str(plain), str(tmp_path / "w"), "--format", "vllm", "--to", "q4_0"]) == 1
    assert "--to is for --format gguf" in capsys.readouterr().err
