"""GGUF files and quantized folders: the `gguf` package reads them, and they give the same model again."""

import json
import struct
import weakref

import gguf as oracle
import numpy as np
import pytest
import torch

import herd
import herd.checkpoint as checkpoint
from herd.checkpoint.gguf import GGUF
from herd.checkpoint.gguf_config import config_from_gguf, model_metadata
from herd.checkpoint.gguf_folder import GGUFSource
from herd.checkpoint.gguf_write import write_gguf
from herd.errors import CheckpointError, QuantError
from herd.llama.config import SIZES, RopeScaling
from herd.quant import blocks, scheme
from herd.quant.formats import F32
from herd.quant.linear import is_quantized, packed_weights, swap_linears
from herd.quant.mixtures import FILE_TYPES, named_scheme
from herd.quant.random import random_quantized

SHAPE = {"dim": 256, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 512, "head_dim": 0}
FORMAT_NAMES = ["q8", "q4", "q4k", "q6k"]


@pytest.fixture
def tokens_BT():
    return torch.randint(512, (2, 13), generator=torch.Generator().manual_seed(0))


def test_written_files_are_read_by_the_gguf_package(plain, tmp_path, tokenizer):
    """Metadata, vocabulary and tensors are correct, q and k in llama.cpp's order."""
    out = tmp_path / "x.gguf"
    checkpoint.export_gguf(plain, out, "f32")
    reader = oracle.GGUFReader(out)
    field = {name: field.contents() for name, field in reader.fields.items()}
    assert field["general.architecture"] == "llama"
    assert field["general.name"] == "toy"
    assert field["llama.rope.freq_base"] == 500_000
    assert field["llama.attention.head_count_kv"] == 2
    assert field["tokenizer.ggml.model"] == "gpt2"
    assert field["tokenizer.ggml.pre"] == "llama-bpe"
    assert len(field["tokenizer.ggml.tokens"]) == 600
    assert field["tokenizer.ggml.tokens"][tokenizer.eot_id] == "<|eot_id|>"
    assert field["tokenizer.ggml.tokens"][-1] == "[PAD599]"
    assert field["tokenizer.ggml.token_type"][tokenizer.bos_id] == oracle.TokenType.CONTROL
    assert field["tokenizer.ggml.bos_token_id"] == tokenizer.bos_id
    assert field["tokenizer.ggml.eot_token_id"] == tokenizer.eot_id
    assert field["tokenizer.chat_template"].startswith("{")
    tensors = {t.name: t for t in reader.tensors}
    model = checkpoint.load_model(plain)
    q = model.get_parameter("model.layers.1.self_attn.q_proj.weight").detach()
    theirs = torch.from_numpy(tensors["blk.1.attn_q.weight"].data.copy())
    pairs = q.view(4, 2, 32, 256).transpose(1, 2).reshape(256, 256)  # llama.cpp: neighbours rotate together
    assert torch.equal(theirs, pairs)
    down = model.get_parameter("model.layers.0.mlp.down_proj.weight").detach()
    assert torch.equal(torch.from_numpy(tensors["blk.0.ffn_down.weight"].data.copy()), down)


@pytest.mark.parametrize("config", [SIZES["8B"], SIZES["1B"], SIZES["8B"].replace(head_dim=64, n_heads=64)])
def test_rope_factors_are_those_of_llama_cpp(config):
    """The expected values are computed as in LlamaModel.generate_extra_tensors of llama.cpp's converter."""
    from herd.checkpoint.gguf_config import rope_factors

    scaling = config.rope_scaling
    freqs = 1.0 / (
        config.rope_theta ** (torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim)
    )
    low, high = (scaling.original_context / f for f in (scaling.low_freq_factor, scaling.high_freq_factor))
    wanted = []
    for freq in freqs.tolist():
        wavelen = 2 * np.pi / freq
        if wavelen < high:
            wanted.append(1.0)
        elif wavelen > low:
            wanted.append(scaling.factor)
        else:
            smooth = (scaling.original_context / wavelen - scaling.low_freq_factor) / (
                scaling.high_freq_factor - scaling.low_freq_factor
            )
            wanted.append(1 / ((1 - smooth) / scaling.factor + smooth))
    torch.testing.assert_close(rope_factors(config), torch.tensor(wanted), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        RopeScaling(),
        RopeScaling(factor=32.0),
        RopeScaling(original_context=64),
        RopeScaling(factor=5.5, low_freq_factor=2.0, high_freq_factor=7.0, original_context=3000),
        RopeScaling(factor=1.0),
    ],
    ids=str,
)
@pytest.mark.parametrize("own", [True, False], ids=["own", "foreign"])
def test_rope_scaling_is_reconstructed_from_its_factors(tmp_path, make_model, scaling, own, monkeypatch):
    """The same rotation results from Herd's own keys and from the tensor alone."""
    from herd.checkpoint import gguf_config
    from herd.llama.rope import inverse_frequencies

    model = make_model(dim=128, n_heads=2, n_kv_heads=1, head_dim=64, ffn_dim=64, rope_scaling=scaling)
    checkpoint.save_model(tmp_path / "a", model)
    if not own:
        whole = gguf_config.model_metadata
        monkeypatch.setattr(
            gguf_config, "model_metadata", lambda c: [v for v in whole(c) if not v[0].startswith("herd.")]
        )
    checkpoint.export_gguf(tmp_path / "a", tmp_path / "a.gguf", "f32")
    found = config_from_gguf(GGUF(tmp_path / "a.gguf"))
    torch.testing.assert_close(
        inverse_frequencies(found), inverse_frequencies(model.config), rtol=1e-5, atol=0
    )
    if own:
        assert found == model.config
    assert found.replace(rope_scaling=None) == model.config.replace(rope_scaling=None)


def test_a_rope_table_of_no_known_scaling_is_taken_as_it_is(plain, tmp_path):
    out = tmp_path / "x.gguf"
    checkpoint.export_gguf(plain, out, "f16")
    entry = GGUF(out).tensors["rope_freqs.weight"]
    data = bytearray(out.read_bytes())
    data[entry.start : entry.start + 8] = struct.pack("<2f", 3.0, 1.5)
    out.write_bytes(data)
    scaling = config_from_gguf(GGUF(out)).rope_scaling
    assert scaling.kind == "factors"
    assert scaling.freq_factors[:2] == (3.0, 1.5)
    data[entry.start : entry.start + 4] = struct.pack("<f", -1.0)
    out.write_bytes(data)
    with pytest.raises(CheckpointError, match="factors that are not positive"):
        config_from_gguf(GGUF(out))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_a_quantized_folder_holds_what_quantizing_in_memory_gives(
    tmp_path, make_model, tokenizer, tokens_BT, name, tied
):
    """The folder holds what quantizing in memory gives, and loading and saving it changes no bit."""
    model = make_model(**SHAPE, tie_embeddings=tied)
    checkpoint.save_model(
        tmp_path / "a", model, tokenizer, lineage=checkpoint.Lineage(name="toy", stage="teacher")
    )
    parent = checkpoint.checkpoint_hash(tmp_path / "a")
    done = []
    source = checkpoint.ImportSource(tmp_path / "a")
    made = checkpoint.quantize_folder(
        source, tmp_path / "b", scheme(name), progress=lambda *x: done.append(x)
    )
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == [
        "generation_config.json",
        "herd.json",
        "model.gguf",
    ]
    assert done[-1][0] == done[-1][1]
    assert done == sorted(done)
    lineage = checkpoint.load_lineage(tmp_path / "b")
    assert lineage.parents == {"toy": parent}
    assert lineage.stage == "teacher"
    assert lineage.weights_hash == made == checkpoint.checkpoint_hash(tmp_path / "b")
    loaded, found = herd.load(tmp_path / "b")
    assert found == tokenizer
    assert loaded.config == model.config
    wanted = swap_linears(model, scheme(name))
    theirs = {n: (f, b) for n, f, b in packed_weights(wanted)}
    ours = {n: (f, b) for n, f, b in packed_weights(loaded)}
    assert {n: f for n, (f, _) in ours.items()} == {n: f for n, (f, _) in theirs.items()}
    assert all(torch.equal(b, theirs[n][1]) for n, (_, b) in ours.items())
    assert torch.equal(loaded.logits(tokens_BT), wanted.logits(tokens_BT))
    checkpoint.save_model(tmp_path / "c", loaded, found, lineage=lineage)
    again = checkpoint.load_model(tmp_path / "c")
    assert all(torch.equal(b, theirs[n][1]) for n, _, b in packed_weights(again))
    assert (tmp_path / "c" / "model.gguf").stat().st_size == (tmp_path / "b" / "model.gguf").stat().st_size


@pytest.mark.parametrize("to", [*FILE_TYPES, "q4", "q4k"])
def test_a_name_means_the_same_formats_in_quantize_and_export(plain, tmp_path, to):
    config = checkpoint.load_config(plain)
    checkpoint.quantize_folder(checkpoint.ImportSource(plain), tmp_path / "q", named_scheme(to, config))
    checkpoint.export_gguf(plain, tmp_path / "x.gguf", to)
    quantized, exported = (
        GGUFSource(file).formats for file in (tmp_path / "q" / "model.gguf", tmp_path / "x.gguf")
    )
    assert quantized == exported == named_scheme(to, config).plan(config)


@pytest.mark.parametrize("name", ["q8", "q4k"])
def test_an_imported_packed_file_is_kept_byte_for_byte(plain, tmp_path, name, tokens_BT, monkeypatch):
    monkeypatch.setenv(
        "HERD_ISA", "reference"
    )  # the same weights, so the same logits: activations are not rounded
    checkpoint.export_gguf(plain, tmp_path / "x.gguf", name)
    checkpoint.import_gguf(tmp_path / "x.gguf", tmp_path / "kept", name="mine")
    assert (tmp_path / "kept" / "model.gguf").read_bytes() == (tmp_path / "x.gguf").read_bytes()
    assert checkpoint.load_lineage(tmp_path / "kept").name == "mine"
    kept = checkpoint.load_model(tmp_path / "kept")
    assert is_quantized(kept)
    checkpoint.import_gguf(tmp_path / "x.gguf", tmp_path / "plain", dtype=torch.float32)
    torch.testing.assert_close(
        checkpoint.load_model(tmp_path / "plain").logits(tokens_BT), kept.logits(tokens_BT)
    )
    checkpoint.export_gguf(tmp_path / "kept", tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "x.gguf").read_bytes()
    with pytest.raises(CheckpointError, match="is quantized already"):
        checkpoint.export_gguf(tmp_path / "kept", tmp_path / "no.gguf", "q4")
    with pytest.raises(CheckpointError, match="is quantized already"):
        checkpoint.ImportSource(tmp_path / "kept")
    checkpoint.export_hf(tmp_path / "kept", tmp_path / "hf", dtype=torch.float32)
    assert torch.equal(
        checkpoint.load_model(tmp_path / "hf").lm_head.weight,
        checkpoint.load_model(tmp_path / "plain").lm_head.weight,
    )


@pytest.mark.parametrize(
    "name, dtype", [("f32", torch.float32), ("f16", torch.float16), ("bf16", torch.bfloat16)]
)
def test_plain_files_become_plain_folders(plain, tmp_path, name, dtype, tokenizer):
    """After export and import the weights are the rounded ones. Tokenizer and configuration are the same."""
    checkpoint.export_gguf(plain, tmp_path / "x.gguf", name)
    checkpoint.import_gguf(tmp_path / "x.gguf", tmp_path / "back")
    model, found = herd.load(tmp_path / "back")
    assert found == tokenizer
    original = checkpoint.load_model(plain)
    assert model.config == original.config
    assert model.dtype == dtype
    for key, param in original.named_parameters():
        assert torch.equal(model.get_parameter(key), param.to(dtype)), key


UP = "blk.0.ffn_up.weight"


def exchange_up(file: GGUF, config, out, format, rows) -> None:
    """Write a file again, with the rows of one tensor in another format."""
    plan = {n: (e.shape, format if n == UP else e.format) for n, e in file.tensors.items()}
    metadata = [("general.architecture", "STRING", "llama"), *model_metadata(config)]
    write_gguf(out, metadata, plan, lambda n: [rows] if n == UP else [file.rows(n)])


@pytest.mark.parametrize("name", sorted(set(oracle.quants._type_traits) - {None}, key=int))
def test_every_other_type_is_unpacked(tmp_path, make_model, name):
    """Blocks of random bytes with finite scales, for each type of the `gguf` package, are unpacked."""
    kind = oracle.GGMLQuantizationType(name)
    model = make_model(**SHAPE, n_layers=1, vocab_size=512)
    checkpoint.save_model(tmp_path / "a", model)
    checkpoint.export_gguf(tmp_path / "a", tmp_path / "a.gguf", "f32")
    format = next(f for f in herd.quant.TYPES.values() if f.code == int(name))
    shape = 512, 256 // format.block * format.block_bytes
    rows = torch.from_numpy(np.random.default_rng(int(name)).integers(0, 40, shape, dtype=np.uint8))
    exchange_up(GGUF(tmp_path / "a.gguf"), model.config, tmp_path / "b.gguf", format, rows)
    checkpoint.import_gguf(tmp_path / "b.gguf", tmp_path / "out", dtype=torch.float32)
    up = checkpoint.load_model(tmp_path / "out").get_parameter("model.layers.0.mlp.up_proj.weight")
    with np.errstate(all="ignore"):
        assert np.array_equal(up.detach().numpy(), oracle.quants.dequantize(rows.numpy(), kind))


def test_types_without_kernels_run_with_a_warning(plain, tmp_path, tokens_BT):
    """A file of another format is kept as it is and runs slowly, with a warning."""
    checkpoint.export_gguf(plain, tmp_path / "a.gguf", "f32")
    file, config = GGUF(tmp_path / "a.gguf"), checkpoint.load_config(plain)
    up = blocks.decode(file.rows(UP), F32)
    rows = torch.from_numpy(oracle.quants.quantize(up.numpy(), oracle.GGMLQuantizationType.MXFP4))
    exchange_up(file, config, tmp_path / "b.gguf", herd.quant.TYPES["MXFP4"], rows)
    with pytest.warns(UserWarning, match="has no tokenizer"):
        checkpoint.import_gguf(tmp_path / "b.gguf", tmp_path / "b")
    with pytest.warns(UserWarning, match="MXFP4 runs slowly here; import it with --dtype bf16"):
        model = checkpoint.load_model(tmp_path / "b")
    near = checkpoint.load_model(plain).logits(tokens_BT)
    assert (model.logits(tokens_BT) - near).norm() < 0.2 * near.norm()


def test_a_quantized_model_computes_in_the_dtype_asked_for(plain, tmp_path, tokens_BT, monkeypatch):
    monkeypatch.setenv("HERD_ISA", "reference")
    checkpoint.quantize_folder(checkpoint.ImportSource(plain), tmp_path / "q", scheme("q8"))
    model = checkpoint.load_model(tmp_path / "q", dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    reference = checkpoint.load_model(tmp_path / "q")
    assert reference.dtype == torch.float32
    near = reference.logits(tokens_BT)
    assert (model.logits(tokens_BT) - near).abs().mean() < 0.05 * near.abs().mean()


def test_rows_that_do_not_divide_are_refused(tmp_path, make_model):
    checkpoint.save_model(tmp_path / "a", make_model(dim=96, n_heads=6, head_dim=16, ffn_dim=80))
    with pytest.raises(
        QuantError, match=r"down_proj.weight: rows of 80 .* Q8_0 blocks of 32; these fit: F16"
    ):
        checkpoint.quantize_folder(checkpoint.ImportSource(tmp_path / "a"), tmp_path / "b", scheme("q8"))
    assert not (tmp_path / "b").exists()


def test_a_failed_conversion_leaves_nothing(plain, tmp_path, make_model):
    model = make_model(**SHAPE)
    model.lm_head.weight.data[599, 255] = torch.inf
    checkpoint.save_model(tmp_path / "a", model)
    for make in (
        lambda: checkpoint.quantize_folder(
            checkpoint.ImportSource(tmp_path / "a"), tmp_path / "b", scheme("q4")
        ),
        lambda: checkpoint.export_gguf(tmp_path / "a", tmp_path / "b.gguf", "q4"),
    ):
        with pytest.raises(QuantError, match=r"lm_head.weight: has values that are not finite"):
            make()
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_export_refuses_targets_that_are_no_gguf_file(plain, tmp_path):
    for out in (tmp_path, tmp_path / "x.bin"):
        with pytest.raises(CheckpointError, match=r"a file that ends in .gguf"):
            checkpoint.export_gguf(plain, out)
    with pytest.raises(CheckpointError, match="no such folder"):
        checkpoint.export_gguf(plain, tmp_path / "no" / "x.gguf")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(CheckpointError, match=r"holds thesis.txt"):
        checkpoint.quantize_folder(checkpoint.ImportSource(plain), tmp_path / "mine", scheme("q8"))
    checkpoint.quantize_folder(checkpoint.ImportSource(plain), tmp_path / "q", scheme("q8"))
    first = checkpoint.checkpoint_hash(tmp_path / "q")
    checkpoint.quantize_folder(
        checkpoint.ImportSource(plain), tmp_path / "q", scheme("q4")
    )  # a checkpoint may be replaced
    assert checkpoint.checkpoint_hash(tmp_path / "q") != first
    (tmp_path / "q" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"both model.gguf and config.json"):
        checkpoint.load_model(tmp_path / "q")


def test_a_gguf_file_is_loaded_as_it_is(plain, tmp_path):
    checkpoint.export_gguf(plain, tmp_path / "x.gguf", "f32")
    loaded, tokenizer = herd.load(tmp_path / "x.gguf")
    expected, its_tokenizer = herd.load(plain)
    assert tokenizer == its_tokenizer
    ids = torch.tensor([[1, 2, 3]])
    assert torch.allclose(loaded.logits(ids), expected.logits(ids), atol=1e-4)


def test_quantizing_holds_one_tensor_at_a_time(plain, tmp_path, monkeypatch):
    """Memory: no more than some rows of one tensor are encoded at once, and no file stays open between
    tensors."""
    from herd.checkpoint import gguf_folder, weights

    monkeypatch.setattr(gguf_folder, "PIECE_ROWS", 64)
    largest = []
    encode = blocks.encode
    monkeypatch.setattr(blocks, "encode", lambda x, *rest: largest.append(x.numel()) or encode(x, *rest))
    held = []
    read = weights.read_tensor

    def read_alone(info):
        assert not any(tensor() is not None for tensor in held), info.name
        tensor = read(info)
        held.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(weights, "read_tensor", read_alone)
    checkpoint.quantize_folder(checkpoint.ImportSource(plain), tmp_path / "q", scheme("q8"))
    assert max(largest) == 64 * 512
    assert len(held) == len(list(checkpoint.load_config(plain).param_shapes()))


def test_metas_tokenizer_survives_gguf(real_data, tmp_path, make_model):
    """All 128,256 tokens are written to the metadata and read again."""
    from herd.checkpoint.gguf_tokenizer import read_tokenizer, tokenizer_metadata
    from herd.text.tokenizer import Tokenizer

    real = Tokenizer.from_file(next(real_data("llama3_tokenizer").glob("**/tokenizer.model")))
    write_gguf(tmp_path / "x.gguf", list(tokenizer_metadata(real, real.vocab_size)), {}, lambda n: [])
    file = GGUF(tmp_path / "x.gguf")
    assert read_tokenizer(file) == real
    assert len(file.metadata["tokenizer.ggml.tokens"]) == 128_256
    assert file.metadata["tokenizer.ggml.eot_token_id"] == 128_009
    assert file.metadata["tokenizer.ggml.eom_token_id"] == 128_008


def test_other_tokenizers_are_dropped_with_a_warning(plain, tmp_path):
    """For another tokenizer or pre-tokenizer the weights are imported, and a warning gives the reason."""
    checkpoint.export_gguf(plain, tmp_path / "x.gguf", "f16")
    data = (tmp_path / "x.gguf").read_bytes()
    for old, new, reason in (
        (b"llama-bpe", b"qwen2-bpe", "its pre-tokenizer is 'qwen2-bpe'"),
        (b"gpt2", b"bert", "'bert'"),
    ):
        (tmp_path / "y.gguf").write_bytes(data.replace(old, new))
        with pytest.warns(UserWarning, match=reason):
            checkpoint.import_gguf(tmp_path / "y.gguf", tmp_path / "y")
        assert not (tmp_path / "y" / "tokenizer.json").exists()


def test_unpacked_weights_descend_from_the_packed_ones(plain, tmp_path):
    made = checkpoint.quantize_folder(
        checkpoint.ImportSource(plain), tmp_path / "q", scheme("q4"), recipe={"format": "Q4_0"}
    )
    lineage = checkpoint.load_lineage(tmp_path / "q")
    assert lineage.recipe == {"format": "Q4_0"}
    checkpoint.export_hf(tmp_path / "q", tmp_path / "hf")
    assert checkpoint.load_lineage(tmp_path / "hf").parents == {"toy-q4_0": made}
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_a_quantized_model_is_unpacked_for_training(tmp_path, make_model, same_bits):
    config = make_model().config.replace(dim=64, n_heads=4, n_kv_heads=2, ffn_dim=96, head_dim=0)
    checkpoint.save_model(tmp_path / "q", random_quantized(config, scheme("q4")))
    checkpoint.export_hf(tmp_path / "q", tmp_path / "plain", dtype=torch.float32)
    trainable = checkpoint.load_trainable(tmp_path / "q", torch.float32, "cpu")
    same_bits(trainable, checkpoint.load_model(tmp_path / "plain"))
    assert all(param.requires_grad for param in trainable.parameters())
