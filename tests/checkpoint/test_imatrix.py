"""File types and importance between Herd and llama.cpp: the same formats, files that each other reads."""

import struct

import gguf
import numpy as np
import pytest
import torch
from llamacpp import ask_llama_cpp

from herd import checkpoint
from herd.checkpoint.gguf import GGUF
from herd.checkpoint.gguf_folder import GGUFSource
from herd.checkpoint.imatrix import read_importance, write_importance
from herd.checkpoint.names import gguf_name
from herd.errors import CheckpointError
from herd.quant.calibration import measure_importance
from herd.quant.mixtures import FILE_TYPES, mixture

WIDE = {"dim": 256, "n_layers": 16, "n_heads": 8, "n_kv_heads": 2, "head_dim": 32, "ffn_dim": 512}
SHAPES = {
    "four heads share values": WIDE,
    "tied": WIDE | {"tie_embeddings": True, "n_kv_heads": 4, "n_layers": 9},
    "rows of 96": WIDE | {"dim": 96, "tie_embeddings": True},
}


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_tensors_have_the_formats_that_llama_cpp_chooses(make_model, tokenizer, tmp_path, changes):
    model = make_model(**changes)
    checkpoint.save_model(tmp_path / "plain", model, tokenizer)
    checkpoint.export_gguf(tmp_path / "plain", tmp_path / "plain.gguf", "f32")
    np.savez(
        tmp_path / "ones.npz",
        **{gguf_name(n): np.ones(shape[1]) for n, shape in model.config.param_shapes() if len(shape) > 1},
    )
    # llama.cpp writes Q2_K_S only with importance
    names = [name for name in FILE_TYPES if name not in ("F32", "F16", "BF16")]
    cases = [(name, weighted) for name in names for weighted in (False, True) if weighted or name != "Q2_K_S"]
    job = {"do": "quantize", "file": str(tmp_path / "plain.gguf"), "pure": False}
    ask_llama_cpp(
        [
            job
            | {"out": f"{tmp_path}/{name}{weighted}.gguf", "ftype": FILE_TYPES[name]}
            | ({"imatrix": str(tmp_path / "ones.npz")} if weighted else {})
            for name, weighted in cases
        ]
    )
    for name, weighted in cases:
        theirs = GGUFSource(tmp_path / f"{name}{weighted}.gguf")
        ours = mixture(name, model.config, with_importance=weighted).formats
        assert {n: f.name for n, f in ours.items()} == {n: f.name for n, f in theirs.formats.items()}, name
        assert theirs.file.get("general.file_type", int) == FILE_TYPES[name]


def test_llama_cpp_runs_our_mixtures(make_model, tokenizer, tmp_path):
    """Both round activations, each in its own way, so logits are only close."""
    model = make_model(**WIDE).init_weights(0, std=0.05)
    checkpoint.save_model(tmp_path / "plain", model, tokenizer)
    source = checkpoint.ImportSource(tmp_path / "plain")
    ids = torch.randint(300, (1, 40), generator=torch.Generator().manual_seed(0))
    names = ("Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M", "IQ4_XS", "IQ4_NL")
    jobs, ours = [], []
    for name in names:
        checkpoint.quantize_folder(source, tmp_path / name, mixture(name, model.config))
        file = tmp_path / name / "model.gguf"
        assert GGUF(file).get("general.file_type", int) == FILE_TYPES[name]
        jobs.append({"do": "logits", "file": str(file), "windows": ids.tolist(), "outs": [f"{file}.npy"]})
        ours.append(checkpoint.load_model(tmp_path / name).logits(ids)[0].detach())
    ask_llama_cpp(jobs)
    for name, mine in zip(names, ours, strict=True):
        theirs = torch.from_numpy(np.load(tmp_path / name / "model.gguf.npy"))
        assert torch.nn.functional.cosine_similarity(mine, theirs, dim=-1).min() > 0.99, name


@pytest.fixture
def measured(make_model):
    model = make_model(**WIDE)
    ids = torch.randint(300, (2, 64), generator=torch.Generator().manual_seed(0))
    return model.config, measure_importance(
        model.config, lambda name: model.get_parameter(name).detach(), [ids]
    )


def test_a_file_of_importance_is_read_back_and_by_the_gguf_package(measured, tmp_path):
    config, importance = measured
    write_importance(tmp_path / "x.gguf", importance, 128, 64, "some text")
    again = read_importance(tmp_path / "x.gguf", config)
    assert again.keys() == importance.keys()
    for name, mean_D in importance.items():
        torch.testing.assert_close(again[name], mean_D)
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    assert reader.fields["general.type"].contents() == "imatrix"
    assert reader.fields["imatrix.chunk_count"].contents() == 2
    assert reader.fields["imatrix.datasets"].contents() == ["some text"]
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    down = tensors["blk.0.ffn_down.weight.in_sum2"]
    assert down.shape.tolist() == [512, 1]
    assert tensors["blk.0.ffn_down.weight.counts"].data.item() == 128
    torch.testing.assert_close(
        torch.from_numpy(np.array(down.data)).flatten(),
        128 * importance["model.layers.0.mlp.down_proj.weight"],
    )


def test_an_older_file_is_read(measured, tmp_path):
    """Entries of name, calls and sums, and at the end the number of chunks and the text's name."""
    config, _ = measured
    values = np.arange(256, dtype=np.float32)
    name = b"blk.3.attn_q.weight"
    data = struct.pack("<ii", 1, len(name)) + name + struct.pack("<ii", 4, 256) + values.tobytes()
    (tmp_path / "x.dat").write_bytes(data + struct.pack("<ii", 4, 3) + b"txt")
    found = read_importance(tmp_path / "x.dat", config)
    assert found.keys() == {"model.layers.3.self_attn.q_proj.weight"}
    assert torch.equal(found["model.layers.3.self_attn.q_proj.weight"], torch.arange(256) / 4)
    (tmp_path / "y.dat").write_bytes(data[:-7])
    with pytest.raises(CheckpointError, match="or truncated"):
        read_importance(tmp_path / "y.dat", config)
    (tmp_path / "z.dat").write_bytes(b"not importance at all, but text")
    with pytest.raises(CheckpointError, match="neither a GGUF file nor"):
        read_importance(tmp_path / "z.dat", config)


def test_importance_of_another_model_is_refused(measured, make_model, tmp_path):
    config, importance = measured
    write_importance(tmp_path / "x.gguf", importance, 128, 64, "text")
    with pytest.raises(CheckpointError, match="columns, the model's"):
        read_importance(tmp_path / "x.gguf", config.replace(ffn_dim=768))
    with pytest.raises(CheckpointError, match=r"no\.gguf: no such file"):
        read_importance(tmp_path / "no.gguf", config)
    checkpoint.save_model(tmp_path / "plain", make_model(**WIDE))
    checkpoint.export_gguf(tmp_path / "plain", tmp_path / "model.gguf", "f32")
    with pytest.raises(CheckpointError, match="importance of no matrix"):
        read_importance(tmp_path / "model.gguf", config)
    importance["model.layers.0.mlp.up_proj.weight"][3] = torch.nan
    write_importance(tmp_path / "nan.gguf", importance, 128, 64, "text")
    with pytest.raises(CheckpointError, match="not mean squares"):
        read_importance(tmp_path / "nan.gguf", config)
