"""Checkpoints as other tools write them: prefixes, fp32 norms, a lone head, adapters, split files."""

import json
import shutil
import warnings

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

from herd import checkpoint
from herd.checkpoint.gguf import GGUF
from herd.errors import CheckpointError
from herd.quant import scheme

SHAPE = {"dim": 64, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 96, "head_dim": 16}
LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123\n"


@pytest.fixture
def saved(tmp_path, make_model, tokenizer):
    """saved(change, **shape) -> (model, folder), its tensors changed by ``change(state) -> state``."""

    def make(change, **more):
        model = make_model(**(SHAPE | more))
        folder = tmp_path / "model"
        checkpoint.save_model(folder, model, tokenizer)
        state = load_file(folder / "model.safetensors")
        save_file(change(state), folder / "model.safetensors")
        return model, folder

    return make


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_compiled_and_distributed_models_are_removed_with_a_warning(saved, same_bits, prefix):
    model, folder = saved(lambda state: {prefix + name: t for name, t in state.items()})
    with pytest.warns(UserWarning, match="removing the prefix"):
        same_bits(checkpoint.load_model(folder), model)


@pytest.mark.parametrize("wrapper", ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"])
def test_wrappers_inside_the_names_of_tensors_are_removed(saved, same_bits, wrapper):
    def wrapped(name):
        return name.replace("layers.0.", f"layers.0.{wrapper}.").replace("model.", f"model.{wrapper}.", 1)

    model, folder = saved(lambda state: {wrapped(name): tensor for name, tensor in state.items()})
    with pytest.warns(UserWarning, match=f"removing the prefix {wrapper}"):
        same_bits(checkpoint.load_model(folder), model)


def test_prefixes_on_some_tensors_are_removed_but_not_where_names_then_collide(saved, same_bits):
    head = "lm_head.weight"
    model, folder = saved(
        lambda state: {n if n == head else f"_orig_mod.{n}": tensor for n, tensor in state.items()}
    )
    with pytest.warns(UserWarning, match="removing the prefix _orig_mod"):
        same_bits(checkpoint.load_model(folder), model)
    state = load_file(folder / "model.safetensors")
    save_file(state | {f"module.{head}": state[head].clone()}, folder / "model.safetensors")
    with (
        pytest.warns(UserWarning, match="prefix"),
        pytest.raises(CheckpointError, match=r"lm_head\.weight with and without"),
    ):
        checkpoint.load_model(folder)


def test_a_tied_model_that_stores_only_its_head_is_loaded(saved, same_bits, tmp_path):
    def only_head(state):
        state["lm_head.weight"] = state.pop("model.embed_tokens.weight")
        return state

    model, folder = saved(only_head, tie_embeddings=True)
    same_bits(checkpoint.load_model(folder), model)
    checkpoint.import_hf(folder, tmp_path / "imported")
    same_bits(checkpoint.load_model(tmp_path / "imported"), model)


@pytest.mark.parametrize("norm", ["model.norm.weight", "model.layers.1.input_layernorm.weight"])
def test_one_fp32_norm_does_not_make_the_model_fp32(saved, tmp_path, norm):
    _, folder = saved(lambda s: {n: t.float() if n == norm else t.bfloat16() for n, t in s.items()})
    (folder / "herd.json").unlink(missing_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert checkpoint.load_model(folder).dtype == torch.bfloat16
        checkpoint.import_hf(folder, tmp_path / "imported")
    stored = load_file(tmp_path / "imported" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}


def test_an_adapter_next_to_the_weights_is_said_and_not_copied(saved, tmp_path):
    _, folder = saved(lambda state: state)
    save_file({"x": torch.ones(1)}, folder / "adapter_model.safetensors")
    for use in (checkpoint.load_model, lambda f: checkpoint.import_hf(f, tmp_path / "imported")):
        with pytest.warns(UserWarning, match="ignoring adapter_model.safetensors"):
            use(folder)
    assert not (tmp_path / "imported" / "adapter_model.safetensors").exists()


def test_an_adapter_alone_is_refused_with_the_cure(tmp_path):
    save_file({"x": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"adapter_config.json: does not name the base model"):
        checkpoint.load_model(tmp_path)


def test_git_lfs_pointers_are_refused_with_the_cure(saved, tmp_path):
    _, folder = saved(lambda state: state)
    (folder / "model.safetensors").write_text(LFS_POINTER)
    (tmp_path / "m.gguf").write_text(LFS_POINTER)
    for name in ("config.json", "tokenizer.json", "tokenizer.model", "generation_config.json"):
        other = shutil.copytree(folder, tmp_path / name)
        (other / name).write_text(LFS_POINTER)
        with pytest.raises(CheckpointError, match=rf"{name}: is a git-lfs pointer.*git lfs pull"):
            checkpoint.ModelSource(other)
    for use in (lambda: checkpoint.load_model(folder), lambda: GGUF(tmp_path / "m.gguf")):
        with pytest.raises(CheckpointError, match=r"git-lfs pointer.*git lfs pull"):
            use()


@pytest.fixture
def split(saved, tmp_path):
    """split(format) -> (model, paths): a GGUF file cut in three parts, as llama-gguf-split does it."""

    def make(format):
        model, folder = saved(lambda state: state)
        whole = tmp_path / "whole.gguf"
        if format == "f32":
            checkpoint.export_gguf(folder, whole, "f32")
        else:
            checkpoint.quantize_folder(checkpoint.ImportSource(folder), tmp_path / "q", scheme(format))
            whole = tmp_path / "q" / "model.gguf"
        reader = gguf.GGUFReader(whole)
        names = [tensor.name for tensor in reader.tensors]
        cuts = [names[:5], names[5:12], names[12:]]
        paths = [tmp_path / f"m-{part:05}-of-00003.gguf" for part in (1, 2, 3)]
        for number, (path, some) in enumerate(zip(paths, cuts, strict=True)):
            writer = gguf.GGUFWriter(path, "llama")
            if number == 0:
                for field in reader.fields.values():
                    kind, sub = field.types[0], field.types[1] if len(field.types) > 1 else None
                    if not field.name.startswith("GGUF.") and field.name != "general.architecture":
                        writer.add_key_value(field.name, field.contents(), kind, sub)
            writer.add_uint16("split.no", number)
            writer.add_uint16("split.count", 3)
            writer.add_int32("split.tensors.count", len(names))
            for tensor in (t for t in reader.tensors if t.name in some):
                writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
        return model, whole, paths

    return make


@pytest.mark.parametrize("format", ["f32", "q8"])
def test_the_parts_of_a_split_gguf_are_read_together(split, tmp_path, same_bits, tokenizer, format):
    model, whole, paths = split(format)
    checkpoint.import_gguf(paths[0], tmp_path / "joined")
    checkpoint.import_gguf(whole, tmp_path / "kept")
    loaded = checkpoint.load_model(tmp_path / "joined")
    if format == "f32":
        same_bits(loaded, model)
    tokens = torch.arange(12)[None]
    expected = checkpoint.load_model(tmp_path / "kept").logits(tokens)
    assert torch.equal(loaded.logits(tokens), expected)
    assert checkpoint.load_tokenizer(tmp_path / "joined") == tokenizer


def test_missing_wrong_and_joined_parts_are_explained(split, tmp_path):
    _, _, paths = split("f32")
    joined = tmp_path / "joined.gguf"
    joined.write_bytes(b"".join(path.read_bytes() for path in paths))
    with pytest.raises(CheckpointError, match="not joined by cat"):
        checkpoint.import_gguf(joined, tmp_path / "out")
    renamed = tmp_path / "model.gguf"
    renamed.write_bytes(paths[0].read_bytes())
    with pytest.raises(CheckpointError, match="part 1 of 3; keep the names"):
        checkpoint.import_gguf(renamed, tmp_path / "out")
    paths[2].write_bytes(paths[1].read_bytes())
    with pytest.raises(CheckpointError, match=r"m-00003-of-00003\.gguf: is not part 3"):
        checkpoint.import_gguf(paths[0], tmp_path / "out")
    paths[2].unlink()
    with pytest.raises(CheckpointError, match=r"m-00003-of-00003\.gguf is missing"):
        checkpoint.import_gguf(paths[0], tmp_path / "out")


def test_reported_split_file_and_adapter(tmp_path):
    import os
    from pathlib import Path

    cases = Path(os.environ.get("HERD_TEST_CASES", "missing"))
    if not cases.exists():
        pytest.skip("needs HERD_TEST_CASES")
    checkpoint.import_gguf(cases / "m-00001-of-00002.gguf", tmp_path / "joined")
    checkpoint.load_model(tmp_path / "joined")
    with pytest.warns(UserWarning, match="adapter_model.safetensors"):
        checkpoint.load_model(cases / "hf-adapter-beside")
    assert json.loads((cases / "hf-adapter-beside" / "config.json").read_text())["model_type"] == "llama"
