"""Every variant of the Llama architecture survives all layouts: RoPE kinds, biases, head_dim, windows, FP8.

Weights that another program has quantized, and adapters, are refused with what to take instead.
"""

import json
import math
import warnings

import gguf
import numpy as np
import pytest
import torch
from llamacpp import ask_llama_cpp
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from herd import checkpoint
from herd.checkpoint.gguf import GGUF
from herd.checkpoint.gguf_config import config_from_gguf, model_metadata, rope_factors
from herd.checkpoint.gguf_folder import GGUFSource
from herd.checkpoint.gguf_write import write_gguf
from herd.engine import Engine, Request, Sampling
from herd.errors import CheckpointError
from herd.llama.config import SIZES, RopeScaling
from herd.llama.rope import inverse_frequencies
from herd.quant import scheme
from herd.quant.formats import F32, TYPES
from herd.quant.gptq import Gptq
from herd.quant.linear import fused_layers, swap_linears

ROPE = {
    "linear": RopeScaling(2.5, kind="linear"),
    "dynamic": RopeScaling(4.0, original_context=512, kind="dynamic"),
    "yarn": RopeScaling(4.0, original_context=128, kind="yarn"),
    "yarn, other amplitude": RopeScaling(4.0, original_context=128, kind="yarn", attention_factor=0.75),
    "yarn, other ramp": RopeScaling(
        3.5, original_context=100, kind="yarn", beta_fast=20.0, beta_slow=2.0, truncate=False
    ),
    "factors": RopeScaling(1.0, original_context=64, kind="factors", freq_factors=(1.0, 0.75, 3.0, 8.5)),
    "factors, amplitude": RopeScaling(
        1.0, original_context=64, kind="factors", freq_factors=(1.0, 0.75, 3.0, 8.5), attention_factor=1.25
    ),
}
VARIANTS = {name: {"rope_scaling": scaling, "rope_theta": 10_000.0} for name, scaling in ROPE.items()} | {
    "attention bias": {"attention_bias": True},
    "mlp bias": {"mlp_bias": True},
    "both biases, tied": {"attention_bias": True, "mlp_bias": True, "tie_embeddings": True},
    "head_dim 24": {"head_dim": 24, "attention_bias": True},
}


@pytest.fixture
def tokens_BT():
    return torch.randint(500, (2, 150), generator=torch.Generator().manual_seed(0))


def herd_keys_removed(monkeypatch):
    """Write GGUF files without Herd's own keys, as another program would."""
    from herd.checkpoint import gguf_config

    monkeypatch.setattr(
        gguf_config,
        "model_metadata",
        lambda config: [value for value in model_metadata(config) if not value[0].startswith("herd.")],
    )


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_a_variant_survives_folders_and_gguf_and_transformers_computes_the_same(
    make_model, same_bits, tmp_path, tokens_BT, name
):
    model = make_model(**VARIANTS[name])
    checkpoint.save_model(tmp_path / "a", model)
    same_bits(checkpoint.load_model(tmp_path / "a"), model)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32)
    logits = model.logits(tokens_BT)
    assert (theirs(tokens_BT).logits - logits).abs().max() <= 1e-4
    checkpoint.export_gguf(tmp_path / "a", tmp_path / "a.gguf", "f32")
    checkpoint.import_gguf(tmp_path / "a.gguf", tmp_path / "b")
    back = checkpoint.load_model(tmp_path / "b")
    same_bits(back, model)
    assert back.config == model.config
    checkpoint.export_hf(tmp_path / "b", tmp_path / "c")
    assert checkpoint.load_config(tmp_path / "c") == model.config


@pytest.mark.parametrize("name", ROPE)
def test_other_programs_keys_give_the_same_rotation(make_model, tmp_path, monkeypatch, name):
    model = make_model(**VARIANTS[name])
    checkpoint.save_model(tmp_path / "a", model)
    herd_keys_removed(monkeypatch)
    checkpoint.export_gguf(tmp_path / "a", tmp_path / "a.gguf", "f32")
    found = config_from_gguf(GGUF(tmp_path / "a.gguf"))
    torch.testing.assert_close(
        inverse_frequencies(found), inverse_frequencies(model.config), rtol=1e-5, atol=0
    )
    amplitude = found.rope_scaling.attention_factor if found.rope_scaling else 1.0
    assert amplitude == pytest.approx(ROPE[name].attention_factor, rel=1e-6)
    standard = name in ("linear", "yarn", "yarn, other amplitude")
    assert (rope_factors(model.config) is None) == (standard or name == "dynamic")
    if standard:
        fields = gguf.GGUFReader(tmp_path / "a.gguf").fields
        assert fields["llama.rope.scaling.type"].contents() == ROPE[name].kind
        assert fields["llama.rope.scaling.factor"].contents() == ROPE[name].factor


@pytest.mark.soak
@torch.no_grad()
def test_llama_cpp_computes_the_same_logits(make_model, tokenizer, tmp_path, tokens_BT):
    """Every kind of scaling and bias, beyond the original context: llama.cpp reads the keys as meant."""
    jobs, wanted = [], []
    for name, changes in VARIANTS.items():
        model = make_model(**changes)
        checkpoint.save_model(tmp_path / name, model, tokenizer)
        checkpoint.export_gguf(tmp_path / name, tmp_path / f"{name}.gguf", "f32")
        outs = [str(tmp_path / f"{name}.npy")]
        windows = [tokens_BT[0].tolist()]
        jobs.append(
            {"do": "logits", "file": str(tmp_path / f"{name}.gguf"), "windows": windows, "outs": outs}
        )
        wanted.append(model.logits(tokens_BT[:1])[0])
    ask_llama_cpp(jobs)
    for job, logits in zip(jobs, wanted, strict=True):
        theirs = torch.from_numpy(np.load(job["outs"][0]))
        assert (theirs - logits).abs().max() <= 1e-3, job["file"]


def written(path, config, changes, extra=None):
    """Write a GGUF file that has metadata, an embedding and ``extra`` tensors, and return its config."""
    values = {key: (kind, value) for key, kind, value in model_metadata(config) if key[:5] == "llama"}
    values = {key: value for key, value in values.items() if "rope.scaling" not in key} | changes
    metadata = [(key, kind, value) for key, (kind, value) in values.items()]
    plan = {name: (tuple(tensor.shape), F32) for name, tensor in (extra or {}).items()}
    # few bytes for the large vocabularies of the released models
    format = TYPES["Q1_0"] if config.dim % 128 == 0 else F32
    plan["token_embd.weight"] = ((config.vocab_size, config.dim), format)
    # one tensor a layer, so that the number of layers is believed
    plan |= {f"blk.{layer}.x": ((1,), F32) for layer in range(config.n_layers)}

    def bytes_of(name: str) -> list[torch.Tensor]:
        if extra and name in extra:
            return [extra[name].flatten().view(torch.uint8)]
        return [
            torch.zeros(
                math.prod(plan[name][0]) // plan[name][1].block * plan[name][1].block_bytes, dtype=torch.uint8
            )
        ]

    write_gguf(path, metadata, plan, bytes_of)
    return config_from_gguf(GGUF(path))


@pytest.mark.parametrize(
    "changes, scaling",
    [
        ({"llama.rope.scale_linear": ("FLOAT32", 4.0)}, RopeScaling(4.0, kind="linear")),
        ({"llama.rope.scale_linear": ("FLOAT32", 1.0)}, None),
        ({"llama.rope.scaling.factor": ("FLOAT32", 8.0)}, RopeScaling(8.0, kind="linear")),
        (
            {"llama.rope.scaling.factor": ("FLOAT32", 8.0), "llama.rope.scaling.type": ("STRING", "none")},
            None,
        ),
        ({"llama.rope.scaling.factor": ("FLOAT32", 0.0)}, None),
        (
            {
                "llama.rope.scaling.type": ("STRING", "yarn"),
                "llama.rope.scaling.factor": ("FLOAT32", 16.0),
                "llama.rope.scaling.original_context_length": ("UINT32", 64),
                "llama.rope.scaling.finetuned": ("BOOL", True),
            },
            RopeScaling(16.0, original_context=64, kind="yarn"),
        ),
    ],
    ids=str,
)
def test_scaling_keys_mean_what_they_mean_to_llama_cpp(make_model, tmp_path, changes, scaling):
    config = make_model(rope_scaling=None).config
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert written(tmp_path / "a.gguf", config, changes) == config.replace(
            rope_scaling=scaling, tie_embeddings=True
        )


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"llama.rope.scaling.factor": ("FLOAT32", float("nan"))}, "factor=nan"),
        ({"llama.rope.scaling.factor": ("FLOAT32", 0.5)}, "factor=0.5"),
        ({"llama.rope.scaling.factor": ("STRING", "4")}, "is a str, not a float"),
        ({"llama.rope.scaling.type": ("STRING", "longrope")}, "scaling.type='longrope'"),
        ({"llama.rope.scaling.type": ("STRING", "llama3")}, "needs rope_freqs.weight"),
        ({"llama.rope.scaling.attn_factor": ("FLOAT32", 0.0)}, "attention factor of 0.0"),
        ({"llama.rope.scaling.attn_factor": ("FLOAT32", float("inf"))}, "attention factor of inf"),
        ({"llama.rope.scale_linear": ("FLOAT32", -2.0)}, "factor=-2.0"),
        ({"llama.attention.sliding_window": ("STRING", "wide")}, "is a str, not a int"),
    ],
    ids=str,
)
def test_scaling_that_cannot_be_is_refused(make_model, tmp_path, changes, named):
    with pytest.raises(CheckpointError, match=r"a\.gguf") as error:
        written(tmp_path / "a.gguf", make_model(rope_scaling=None).config, changes)
    assert named in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "value", [("STRING", "x"), ("FLOAT64", -1.0), ("FLOAT64", float("nan")), ("UINT32", 7)]
)
@pytest.mark.parametrize("field", RopeScaling.__dataclass_fields__)
def test_herds_own_keys_are_only_believed_where_they_fit(make_model, tmp_path, field, value):
    """A damaged key of Herd's own changes nothing: the keys that every program reads decide."""
    config = make_model(rope_scaling=None).config
    own = {"herd.rope_scaling.factor": ("FLOAT64", 4.0), "herd.rope_scaling.kind": ("STRING", "linear")}
    keys = {"llama.rope.scaling.factor": ("FLOAT32", 4.0)} | own | {f"herd.rope_scaling.{field}": value}
    found = written(tmp_path / "a.gguf", config, keys)
    torch.testing.assert_close(inverse_frequencies(found), inverse_frequencies(config) / 4)
    assert found.rope_scaling.attention_factor == 1


def test_linear_scaling_and_a_table_multiply(make_model, tmp_path):
    config = make_model(rope_scaling=None).config
    table = {"rope_freqs.weight": torch.tensor([1.0, 2.0, 0.5, 4.0])}
    found = written(tmp_path / "a.gguf", config, {"llama.rope.scale_linear": ("FLOAT32", 2.0)}, table)
    expected = inverse_frequencies(config) / torch.tensor([2.0, 4.0, 1.0, 8.0])
    torch.testing.assert_close(inverse_frequencies(found), expected)


def test_early_llama_31_files_are_scaled_and_it_is_said(tmp_path):
    """The shape of Llama 3.2 1B (the smallest released one), whose first files had no table of factors."""
    released = SIZES["1B"]
    small = released.replace(vocab_size=32)  # not the released shape: nothing is guessed
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert written(tmp_path / "small.gguf", small, {}).rope_scaling is None
    with pytest.warns(UserWarning, match=r"has no rope_freqs.weight.*using the RoPE scaling of Llama 3's 1B"):
        assert written(tmp_path / "early.gguf", released, {}) == released
    (tmp_path / "early.gguf").unlink()


def test_a_window_of_a_gguf_limits_the_context(make_model, tmp_path):
    config = make_model(rope_scaling=None).config
    with pytest.warns(UserWarning, match="sliding window of 100 tokens; the context is limited"):
        found = written(tmp_path / "a.gguf", config, {"llama.attention.sliding_window": ("UINT32", 100)})
    assert found.max_context == 100


BIASED = {
    "attention bias": {"attention_bias": True},
    "mlp bias": {"mlp_bias": True},
    "both biases, tied": {"attention_bias": True, "mlp_bias": True, "tie_embeddings": True},
    "neither, head_dim 64": {"head_dim": 64},
}


@pytest.fixture
def biased(make_model, tmp_path):
    """biased(name) -> (model, folder) whose rows divide into blocks of 32."""

    def make(name, **more):
        shape = {"dim": 96, "ffn_dim": 128, "n_heads": 6, "n_kv_heads": 3, "head_dim": 32}
        model = make_model(**(shape | BIASED[name] | more))
        checkpoint.save_model(tmp_path / "a", model)
        return model, tmp_path / "a"

    return make


def unpacked(model, folder):
    """Return ``model`` with the weights of a quantized folder."""
    source = GGUFSource(folder / "model.gguf")
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.copy_(source.weight(name, torch.float32))
    return model


@pytest.mark.parametrize("name", BIASED)
@torch.no_grad()
def test_biases_in_quantized_layers(biased, tmp_path, tokens_BT, name, monkeypatch):
    """A quantized model with biases computes like its unpacked weights, in the engine too."""
    model, folder = biased(name)
    plan = scheme("q8", head="f32", embeddings="f32")
    checkpoint.quantize_folder(checkpoint.ImportSource(folder), tmp_path / "q", plan)
    packed = checkpoint.load_model(tmp_path / "q")
    assert packed.config == model.config
    if name in ("attention bias", "mlp bias", "both biases, tied"):
        assert fused_layers(packed) is None  # the fused operator has no biases
    prompt = tokens_BT[0, :20].tolist()
    requests = [Request(prompt, Sampling(max_tokens=5, temperature=0))]
    swapped = swap_linears(checkpoint.load_model(folder), plan)
    assert Engine(swapped, None).run(requests)[0].ids == Engine(packed, None).run(requests)[0].ids
    checkpoint.save_model(tmp_path / "again", packed)
    again, first = (GGUFSource(tmp_path / folder / "model.gguf") for folder in ("again", "q"))
    assert all(torch.equal(again.rows(key), first.rows(key)) for key in first.wanted)
    checkpoint.export_hf(tmp_path / "q", tmp_path / "plain", dtype=torch.float32)
    monkeypatch.setenv("HERD_ISA", "reference")
    wanted = unpacked(model, tmp_path / "q").logits(tokens_BT)
    torch.testing.assert_close(checkpoint.load_model(tmp_path / "plain").logits(tokens_BT), wanted)
    exact = checkpoint.load_model(tmp_path / "q")
    torch.testing.assert_close(exact.logits(tokens_BT), wanted, rtol=1e-4, atol=1e-3)
    ids = Engine(exact, None).run(requests)[0].ids
    assert ids == Engine(model, None).run(requests)[0].ids


def test_gptq_keeps_biases_and_uses_them(biased, tmp_path, tokens_BT):
    """With biases in the layers before it, a calibrated layer differs less from the original."""
    model, folder = biased("both biases, tied", rope_scaling=ROPE["yarn"])
    source, plan = checkpoint.ImportSource(folder), scheme("q4", head="f32", embeddings="f32")
    gptq = Gptq(source.config, source.get, plan, [tokens_BT])
    checkpoint.quantize_folder(source, tmp_path / "q", plan, rows_of=gptq.rows)
    packed = GGUFSource(tmp_path / "q" / "model.gguf")
    for name, param in model.named_parameters():
        if name.endswith(".bias"):
            assert torch.equal(packed.weight(name, torch.float32), param)
    with torch.no_grad():
        wanted = model.logits(tokens_BT)
        errors = [(unpacked(model, tmp_path / "q").logits(tokens_BT) - wanted).norm()]
        checkpoint.quantize_folder(checkpoint.ImportSource(folder), tmp_path / "nearest", plan)
        errors.append((unpacked(model, tmp_path / "nearest").logits(tokens_BT) - wanted).norm())
    assert errors[0] < errors[1]


def test_the_export_for_vllm_carries_biases_and_scaling(biased, tmp_path):
    model, folder = biased("both biases, tied", rope_scaling=ROPE["yarn"])
    checkpoint.export_vllm(folder, tmp_path / "v")
    state = load_file(tmp_path / "v" / "model.safetensors")
    for name, param in model.named_parameters():
        if name.endswith(".bias"):
            assert torch.equal(state[name], param.detach().half())
    written = json.loads((tmp_path / "v" / "config.json").read_text())
    assert (written["attention_bias"], written["mlp_bias"]) == (True, True)
    assert written["rope_scaling"]["rope_type"] == "yarn"
    with pytest.raises(CheckpointError, match=r"quantized by compressed-tensors.*original checkpoint"):
        checkpoint.load_model(tmp_path / "v")


def fp8_folder(folder, model, *, scale_shape=(-1, 1), plain=("layers.0.",)):
    """Write a folder as Meta's Llama 3.1 405B FP8 is laid out and return the values of its weights."""
    checkpoint.save_model(folder, model, dtype=torch.bfloat16)
    (folder / "herd.json").unlink(missing_ok=True)
    state, values = load_file(folder / "model.safetensors"), {}
    for name, weight in list(state.items()):
        if name.endswith("_proj.weight") and not any(part in name for part in plain):
            scales_R1 = weight.float().abs().amax(1, keepdim=True) / 448
            state[name] = (weight.float() / scales_R1).to(torch.float8_e4m3fn)
            state[f"{name}_scale"] = scales_R1.reshape(scale_shape)
            values[name] = (state[name].float() * scales_R1).bfloat16()
        else:
            values[name] = weight
    save_file(state, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "activation_scale_ub": 1200.0,
        "modules_to_not_convert": ["lm_head", "model.layers.0.self_attn.q_proj"],
        "quant_method": "fbgemm_fp8",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return values


@pytest.mark.parametrize("scale_shape", [(-1, 1), (-1,)])
def test_metas_fp8_is_read_as_bf16(make_model, same_bits, tmp_path, scale_shape):
    model = make_model(dim=96, ffn_dim=64, head_dim=32)
    values = fp8_folder(tmp_path / "fp8", model, scale_shape=scale_shape)
    loaded = checkpoint.load_model(tmp_path / "fp8")
    assert loaded.dtype == torch.bfloat16
    for name, param in loaded.named_parameters():
        assert torch.equal(param, values[name]), name
    checkpoint.import_hf(tmp_path / "fp8", tmp_path / "plain")
    same_bits(checkpoint.load_model(tmp_path / "plain"), loaded)
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert checkpoint.checkpoint_hash(tmp_path / "fp8") == checkpoint.checkpoint_hash(tmp_path / "plain")
    checkpoint.quantize_folder(checkpoint.ImportSource(tmp_path / "fp8"), tmp_path / "q", scheme("q8"))
    assert checkpoint.load_config(tmp_path / "q") == model.config


def test_other_fp8_layouts_are_refused(make_model, tmp_path):
    fp8_folder(tmp_path / "a", make_model())
    state = load_file(tmp_path / "a" / "model.safetensors")
    scale = next(name for name in state if name.endswith("_scale"))
    save_file(state | {scale: torch.ones(1)}, tmp_path / "a" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"_scale is F32 \[1\], not a number for each of"):
        checkpoint.load_model(tmp_path / "a")
    del state[scale]
    save_file(state, tmp_path / "a" / "model.safetensors")
    with pytest.raises(CheckpointError, match="is F8_E4M3; only"):
        checkpoint.load_model(tmp_path / "a")


@pytest.mark.parametrize(
    "suffixes, method",
    [
        ((".qweight", ".qzeros", ".scales", ".g_idx"), "GPTQ or AWQ"),
        ((".weight", ".weight.absmax", ".weight.quant_map"), "bitsandbytes"),
        ((".weight", ".SCB"), "bitsandbytes"),
        ((".q_weight", ".q_scale", ".q_invperm"), "ExLlama"),
        ((".weight_packed", ".weight_scale", ".weight_shape"), "compressed-tensors"),
        ((".scales", ".biases", ".weight"), "MLX"),
    ],
)
def test_other_programs_quantized_weights_are_recognized_by_name(make_model, tmp_path, suffixes, method):
    """As in folders whose config.json says nothing, for example early AutoGPTQ's."""
    checkpoint.save_model(tmp_path / "a", make_model())
    state = load_file(tmp_path / "a" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    del state[f"{name}.weight"]
    state |= {name + suffix: torch.zeros(4, dtype=torch.int32) for suffix in suffixes}
    save_file(state, tmp_path / "a" / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"quantized by {method}.*take the original") as error:
        checkpoint.load_model(tmp_path / "a")
    assert "\n" not in str(error.value)


def test_an_adapter_without_a_model_is_named_with_its_base(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base-8b"}))
    (tmp_path / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"base-8b"):
        checkpoint.load_model(tmp_path)
    with pytest.raises(CheckpointError, match=r"is an adapter for org/base-8b.*herd tune merge"):
        checkpoint.import_hf(tmp_path, tmp_path / "out")
