"""Merging: exact in fp32, measured in fewer bits, refused when the update is lost, and GPTQ as the cure."""

import json
import os
import shutil
import warnings

import pytest
import torch
from gguf import GGUFReader

from herd import checkpoint
from herd.checkpoint.adapters import save_adapter
from herd.checkpoint.gguf_folder import GGUFSource
from herd.checkpoint.lineage import Lineage
from herd.cli import run
from herd.errors import CheckpointError, QuantError
from herd.llama.lora import add_lora, lora_layers
from herd.quant.mixtures import mixture
from herd.tune.merge import merge_adapter

pytestmark = pytest.mark.filterwarnings("ignore::herd.data.text_files.DataWarning")


@pytest.fixture
def adapter(base, dialogs, tmp_path):
    """Return a function that makes an adapter whose B has a deviation, with the lineage of its data."""

    def make(std: float):
        model = add_lora(checkpoint.load_model(base, dtype=torch.float32), 4, 2.0)
        torch.manual_seed(0)
        for layer in lora_layers(model).values():
            layer.lora_B.data.normal_(std=std)
        data = {"kind": "tuning", "paths": [str(dialogs)], "heldout_share": 0.3}
        lineage = Lineage(name="tuned", stage="sft", recipe={"data": data, "train": {"context": 256}})
        folder = tmp_path / "adapter"
        save_adapter(folder, model, str(base), checkpoint.load_tokenizer(base), lineage=lineage)
        return folder

    return make


def test_fp32_is_exact_and_bf16_rounds_no_more_than_the_base_does(adapter, tmp_path):
    folder = adapter(0.2)
    exact = merge_adapter(folder, "fp32", tmp_path / "fp32")
    assert exact.written
    assert exact.merged_kl < 1e-6
    assert exact.survived > 0.999
    assert exact.tuned_loss == pytest.approx(exact.merged_loss, abs=1e-5)
    rounded = merge_adapter(folder, "bf16", tmp_path / "bf16")
    assert rounded.merged_kl < 3 * rounded.base_rounding_kl + 1e-6
    assert rounded.update_kl == pytest.approx(exact.update_kl, rel=1e-4)
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        tuned, merged = (
            checkpoint.load_model(path, dtype=torch.float32) for path in (folder, tmp_path / "fp32")
        )
        torch.testing.assert_close(tuned.logits(tokens), merged.logits(tokens), atol=1e-4, rtol=0)
    evals = checkpoint.load_lineage(tmp_path / "bf16").evals["merge"]
    assert evals["survived"] == rounded.survived


def test_an_adapter_in_the_folder_of_its_model_is_named_and_merged_on_request(adapter, base, tmp_path):
    folder = adapter(0.2)
    both = shutil.copytree(base, tmp_path / "both")
    shutil.copy(folder / "adapter_model.safetensors", both)
    config = json.loads((folder / "adapter_config.json").read_text())
    (both / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    merge_adapter(folder, "fp32", tmp_path / "apart")
    with pytest.warns(
        UserWarning, match=r"ignoring adapter_model.safetensors; .*herd tune merge .*both --to"
    ):
        before = checkpoint.load_model(both)
    assert merge_adapter(
        both, "fp32", tmp_path / "together", examples=[str(both / "../dialogs.jsonl")]
    ).written
    apart, together = (checkpoint.load_model(tmp_path / name) for name in ("apart", "together"))
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(apart.logits(tokens), together.logits(tokens))
        assert not torch.equal(apart.logits(tokens), before.logits(tokens))
    parents = checkpoint.load_lineage(tmp_path / "together").parents
    assert parents["base"] == checkpoint.checkpoint_hash(both) != parents["adapter"]


@pytest.mark.parametrize("to", ["Q8_0", "Q4_0", "Q4_K_M"])
def test_packed_files_are_measured_as_they_are_read_again(adapter, tmp_path, to):
    found = merge_adapter(adapter(0.5), to, tmp_path / "out", force=True)
    assert found.written
    assert 0 < found.merged_kl < found.update_kl
    model = checkpoint.load_model(tmp_path / "out")
    written = GGUFSource(tmp_path / "out" / "model.gguf").formats
    assert written == mixture(to, model.config).formats  # as `herd quantize --to` writes them


def test_a_lost_update_is_refused_with_its_share_and_nothing_is_written(adapter, tmp_path, capsys):
    folder = adapter(1e-4)
    assert run(["tune", "merge", str(folder), "--to", "Q4_0"]) == 1
    said = capsys.readouterr()
    assert "rounding to Q4_0\ncomparing with base + adapter on the held-out examples" in said.err
    assert "only 0 % of the update survived Q4_0" in said.err
    assert "--gptq" in said.err
    assert "survived  0.0 %" in said.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "dialogs.jsonl"]
    assert run(["tune", "merge", str(folder), "--to", "Q4_0", "--force", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["written"]
    assert (tmp_path / "merged-q4_0" / "model.gguf").exists()


def test_gptq_on_the_examples_brings_the_merge_closer(adapter, tmp_path, dialogs):
    folder = adapter(0.5)
    plain = merge_adapter(folder, "Q4_0", tmp_path / "plain", force=True)
    fitted = merge_adapter(folder, "Q4_0", tmp_path / "fitted", force=True, gptq=True)
    assert fitted.merged_kl < 0.8 * plain.merged_kl


def test_a_repair_brings_the_merge_much_closer_and_is_in_the_lineage(adapter, tmp_path):
    folder = adapter(0.5)
    plain = merge_adapter(folder, "Q4_0", tmp_path / "plain", force=True)
    steps: list[int] = []
    found = merge_adapter(
        folder,
        "Q4_0",
        tmp_path / "repaired",
        repair=40_000,
        on_step=lambda record: steps.append(record["step"]),
    )
    assert found.written
    assert found.merged_kl < 0.5 * plain.merged_kl
    assert len(steps) == 19
    model, lineage = (
        load(tmp_path / "repaired") for load in (checkpoint.load_model, checkpoint.load_lineage)
    )
    assert model.model.layers[0].mlp.up_proj.format.name == "Q4_0"
    assert lineage.recipe == {"merge": "Q4_0", "gptq": False, "repair": 40_000}


def test_only_packed_merges_are_repaired_and_in_one_way(adapter, tmp_path):
    folder = adapter(0.1)
    with pytest.raises(QuantError, match="for packed formats only"):
        merge_adapter(folder, "bf16", tmp_path / "out", repair=1000)
    with pytest.raises(QuantError, match="give only one"):
        merge_adapter(folder, "Q4_0", tmp_path / "out", repair=1000, gptq=True)


def test_what_cannot_be_merged_is_refused(adapter, base, tmp_path):
    with pytest.raises(CheckpointError, match="is not an adapter"):
        merge_adapter(base, "fp32", tmp_path / "out")
    for to in ("Q9", "", "../../x", "4.2bpw"):
        with pytest.raises(QuantError, match=r"is not known: choose F32, .*Q4_K_M"):
            merge_adapter(adapter(0.1), to, tmp_path / "out")


def test_a_merge_replaces_neither_other_files_nor_its_base(adapter, base, tmp_path, capsys):
    folder, thesis = adapter(0.2), tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "thesis.txt").write_text("mine")
    own = shutil.copytree(base, tmp_path / "own")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(own)}))
    for out, said in (
        (thesis, "holds thesis.txt"),
        (own, "contains the model that is being read"),
        (folder, "is being read"),
    ):
        assert run(["tune", "merge", str(folder), "--to", "fp32", "--out", str(out)]) == 1
        assert said in capsys.readouterr().err
    assert (thesis / "thesis.txt").read_text() == "mine"
    shutil.rmtree(own)
    assert run(["tune", "merge", str(folder), "--to", "fp32"]) == 1
    said = capsys.readouterr().err
    assert f"{folder}: its base model is not there ({own}: no such file or folder)" in said
    assert f"write its new path into {folder / 'adapter_config.json'}" in said


def test_merges_into_one_folder_do_not_disturb_each_other_and_leave_nothing(adapter, tmp_path, monkeypatch):
    folder, out, seen = adapter(0.2), tmp_path / "out", set()

    def merge_again(line):
        if line.startswith("comparing") and not out.exists():
            merge_adapter(folder, "fp32", out)

    def write(*words, **more):  # a killed one would leave all hidden names that are there now
        get = words[2]
        words = (*words[:2], lambda name: seen.update(tmp_path.glob(".*")) or get(name), *words[3:])
        return checkpoint.write_checkpoint(*words, **more)

    monkeypatch.setattr("herd.tune.merge.write_checkpoint", write)
    assert merge_adapter(folder, "fp32", out, say=merge_again).written
    assert checkpoint.load_model(out).config.dim == 64
    assert not list(tmp_path.glob(".*"))
    for path in seen:
        dead = path.with_name(path.name.replace(str(os.getpid()), "4194305"))  # more than a process id can be
        (dead / "model").mkdir(parents=True)
    assert merge_adapter(folder, "fp32", out).written
    assert not list(tmp_path.glob(".*"))


def test_an_adapter_is_not_trained_as_if_it_were_its_base(adapter, dialogs, tmp_path, capsys):
    folder = adapter(0.2)
    assert run(["tune", str(folder), "--data", str(dialogs), "--out", str(tmp_path / "run"), "--check"]) == 1
    assert f"herd tune merge {folder} --to bf16" in capsys.readouterr().err


def test_a_gguf_adapter_is_written_for_llama_cpp(adapter, tmp_path, capsys):
    assert run(["tune", "merge", str(adapter(0.1)), "--to", "gguf-adapter"]) == 0
    file = tmp_path / "adapter.gguf"
    assert capsys.readouterr().out.strip() == str(file)
    assert len(GGUFReader(file).tensors) == 28


def test_a_base_other_than_the_one_that_the_adapter_was_trained_on_is_named(adapter, base, tmp_path):
    folder = adapter(0.2)
    for parent, warned in ((checkpoint.checkpoint_hash(base), 0), ("0" * 64, 1)):
        lineage = json.loads((folder / "herd.json").read_text())
        (folder / "herd.json").write_text(json.dumps(lineage | {"parents": {"start": parent}}))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            merge_adapter(folder, "fp32", tmp_path / "merged")
        assert sum("was trained on other weights" in str(each.message) for each in caught) == warned


def test_a_base_that_was_replaced_is_named_when_the_adapter_is_loaded(adapter, base, tmp_path):
    folder, own = adapter(0.2), tmp_path / "own"
    model, tokenizer = checkpoint.load_model(base), checkpoint.load_tokenizer(base)
    trained_on = checkpoint.save_model(own, model, tokenizer, lineage=Lineage(name="own", stage="base"))
    for name, changes in (
        ("adapter_config.json", {"base_model_name_or_path": str(own)}),
        ("herd.json", {"parents": {"start": trained_on}}),
    ):
        known = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(known | changes))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checkpoint.load_model(folder)
    model.model.norm.weight.data += 1
    checkpoint.save_model(own, model, tokenizer, lineage=Lineage(name="own", stage="base"))
    with pytest.warns(UserWarning, match="was trained on other weights than those of"):
        checkpoint.load_model(folder)
