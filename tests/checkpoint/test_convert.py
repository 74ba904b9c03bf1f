"""Import from and export to Hugging Face folders: same weights, other programs' files kept, lineage carried
on."""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaForCausalLM

import herd.checkpoint as checkpoint
from herd.checkpoint.lineage import Lineage, licence_notice, load_lineage, released_as
from herd.errors import CheckpointError
from herd.llama.config import SIZES


@pytest.mark.parametrize("tie", [False, True])
def test_a_folder_written_by_transformers_is_imported(tmp_path, make_model, tokenizer, same_bits, tie):
    model = make_model(tie_embeddings=tie)
    checkpoint.save_model(tmp_path / "a", model, tokenizer)
    LlamaForCausalLM.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b", max_shard_size=50_000)
    AutoTokenizer.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    hash_ = checkpoint.import_hf(tmp_path / "b", tmp_path / "c", name="Llama-x")
    same_bits(checkpoint.load_model(tmp_path / "c"), model)
    assert checkpoint.load_tokenizer(tmp_path / "c").ranks == tokenizer.ranks
    assert load_lineage(tmp_path / "c").name == "Llama-x"
    assert load_lineage(tmp_path / "c").weights_hash == hash_ == checkpoint.checkpoint_hash(tmp_path / "a")
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    assert config["eos_token_id"] == sorted(tokenizer.stop_ids)


def test_files_of_the_release_are_kept(tmp_path, make_model, tokenizer):
    checkpoint.save_model(tmp_path / "a", make_model(), tokenizer)
    kept = {
        "generation_config.json": b'{"temperature": 0.3}',
        "LICENSE": b"terms",
        "USE_POLICY.md": b"policy",
        "tokenizer_config.json": (tmp_path / "a" / "tokenizer_config.json")
        .read_bytes()
        .replace(b"{", b"{ ", 1),
    }
    for name, data in kept.items():
        (tmp_path / "a" / name).write_bytes(data)
    checkpoint.import_hf(tmp_path / "a", tmp_path / "b")
    for name, data in kept.items():
        assert (tmp_path / "b" / name).read_bytes() == data


def test_a_tokenizer_of_another_kind_is_kept_and_announced(tmp_path, make_model):
    checkpoint.save_model(tmp_path / "a", make_model())
    (tmp_path / "a" / "tokenizer.model").write_bytes(b"\x0a\x0e\x0a\x05<unk>\x15")
    with pytest.warns(UserWarning, match="cannot be used here"):
        checkpoint.import_hf(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b" / "tokenizer.model").read_bytes() == b"\x0a\x0e\x0a\x05<unk>\x15"


def test_an_export_is_read_by_transformers_in_the_dtype_asked_for(
    tmp_path, make_model, tokenizer, monkeypatch
):
    monkeypatch.setattr("herd.checkpoint.write.MAX_SHARD_BYTES", 40_000)
    model = make_model()
    checkpoint.save_model(tmp_path / "a", model, tokenizer)
    seen = []
    checkpoint.export_hf(
        tmp_path / "a",
        tmp_path / "b",
        dtype=torch.bfloat16,
        progress=lambda done, total: seen.append(done / total),
    )
    assert seen[-1] == 1.0
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 1
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "b", dtype="auto")
    assert theirs.dtype == torch.bfloat16
    for name, param in model.named_parameters():
        assert torch.equal(theirs.state_dict()[name], param.bfloat16())


def test_exported_weights_keep_their_lineage_and_rounded_ones_become_children(
    tmp_path, make_model, tokenizer
):
    exact = checkpoint.save_model(
        tmp_path / "a",
        make_model(),
        tokenizer,
        lineage=Lineage(name="teacher", stage="teacher", recipe={"steps": 3}),
    )
    checkpoint.export_hf(tmp_path / "a", tmp_path / "same")
    assert load_lineage(tmp_path / "same") == load_lineage(tmp_path / "a")
    checkpoint.export_hf(tmp_path / "a", tmp_path / "rounded", dtype=torch.bfloat16)
    rounded = load_lineage(tmp_path / "rounded")
    assert rounded.parents == {"teacher": exact}
    assert rounded.weights_hash != exact
    assert rounded.recipe == {"steps": 3}


def test_a_folder_can_be_exported_to_itself(tmp_path, make_model, tokenizer, same_bits, monkeypatch):
    checkpoint.save_model(tmp_path / "a", make_model(), tokenizer)
    monkeypatch.setattr("herd.checkpoint.write.MAX_SHARD_BYTES", 40_000)
    checkpoint.export_hf(tmp_path / "a", tmp_path / "a")
    same_bits(checkpoint.load_model(tmp_path / "a"), make_model())


def test_weights_that_are_not_finite_are_refused(tmp_path, make_model):
    checkpoint.save_model(tmp_path / "a", make_model())
    state = load_file(tmp_path / "a" / "model.safetensors")
    state["model.norm.weight"][0] = float("nan")
    save_file(state, tmp_path / "a" / "model.safetensors")
    with (
        pytest.raises(CheckpointError, match=r"model\.norm\.weight has values that are not finite"),
        pytest.warns(),
    ):
        checkpoint.import_hf(tmp_path / "a", tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_conversion_holds_one_tensor_at_a_time(tmp_path, make_model, tokenizer, monkeypatch):
    """The next tensor is read only after the last one has been written, so memory holds one."""
    from herd.checkpoint import write

    checkpoint.save_model(tmp_path / "a", make_model(), tokenizer)
    order = []
    monkeypatch.setattr(
        write,
        "tensor_digest",
        lambda name, *rest, digest=write.tensor_digest: (
            order.append(("written", name)) or digest(name, *rest)
        ),
    )
    weights = checkpoint.folder.weights
    monkeypatch.setattr(
        weights,
        "read_tensor",
        lambda info, read=weights.read_tensor: order.append(("read", info.name)) or read(info),
    )
    checkpoint.import_hf(tmp_path / "a", tmp_path / "b")
    assert [step for step, _ in order] == ["read", "written"] * (len(order) // 2)
    assert [name for step, name in order if step == "read"] == [
        n for n, _ in make_model().config.param_shapes()
    ]


@pytest.mark.parametrize("size", SIZES)
def test_the_notice_of_metas_licence_follows_from_the_shape(size):
    config = SIZES[size]
    assert released_as(config.replace(max_context=9)) == size
    assert released_as(config.replace(ffn_dim=9)) is None
    assert licence_notice(config.replace(n_layers=1)) is None
    assert licence_notice(config).startswith(
        "Llama 3.2 is" if size in ("1B", "3B") else "Llama 3.1 is licensed under the Llama"
    )
    if size == "8B":
        assert licence_notice(config.replace(rope_scaling=None)).startswith("Meta Llama 3 is")


def test_a_folder_without_tokenizer_is_converted_with_a_warning(tmp_path, make_model):
    checkpoint.save_model(tmp_path / "a", make_model())
    with pytest.warns(UserWarning, match="has no tokenizer"):
        checkpoint.export_hf(tmp_path / "a", tmp_path / "b")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checkpoint.load_model(tmp_path / "b")
