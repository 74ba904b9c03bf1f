"""What a user may type for a model, and models that other programs keep on this disk."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import herd.checkpoint as checkpoint
from herd.checkpoint import catalogue, sources
from herd.checkpoint.gguf_write import write_gguf
from herd.checkpoint.pull import remove_model
from herd.cli import run
from herd.errors import CheckpointError


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """An empty home folder, so that nothing of this machine is found."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("HF_HOME", "HF_HUB_CACHE", "OLLAMA_MODELS"):
        monkeypatch.delenv(name, raising=False)
    for module in ("catalogue", "pull"):  # not HERD_CACHE, which also holds the native kernels
        monkeypatch.setattr(f"herd.checkpoint.{module}.cache_folder", lambda: tmp_path / "cache")
    return tmp_path / "home"


@pytest.fixture(scope="module")
def gguf(tmp_path_factory, make_model, tokenizer):
    """A whole GGUF file of a small model."""
    folder = tmp_path_factory.mktemp("gguf")
    checkpoint.save_model(folder / "small", make_model(), tokenizer)
    checkpoint.export_gguf(folder / "small", folder / "small.gguf", "f16")
    return folder / "small.gguf"


def put(source: Path, target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(source.read_bytes())
    return target


def refused(text: str, reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason) as error:
        sources.resolve_model(text)
    assert "\n" not in str(error.value)


def test_every_name_of_the_catalogue_is_found_also_by_alias_and_in_any_case():
    for name, entry in catalogue.catalogue().items():
        for written in (name, name.upper(), *entry.aliases):
            assert catalogue.find_name(written) == (name, entry)
        assert entry.source.startswith(("hf:", "pypi:"))


def test_a_name_is_a_file_of_four_bits_and_the_original_is_named_bf16():
    known = catalogue.catalogue()
    originals = {name.removesuffix("-bf16"): known[name] for name in known if name.endswith("-bf16")}
    assert {
        "smollm2-135m",
        "llama3.2-1b",
        "llama3.1-8b",
        "llama3.1-70b",
        "deepseek-r1-8b",
    } <= originals.keys()
    for name, original in originals.items():
        small = known[name]
        assert small.source.lower().endswith(("q4_k_m.gguf", "q4_1.gguf"))
        assert "4 bits" in small.about
        assert not small.gated
        assert small.licence == original.licence
        assert small.gb < 0.4 * original.gb


def test_a_name_that_is_almost_right_is_suggested():
    refused("smollm", "smollm: no such file, folder or model name; did you mean smollm2")
    refused("llama3.1-8", "did you mean llama3.1-8b")
    refused("zzz", "`herd list` shows the names; hf:ORG/NAME takes any repository")


def test_a_repository_without_its_prefix_is_explained():
    refused(
        "meta-llama/Llama-3.2-1B",
        "no such file or folder; if you mean a repository of the hub, write hf:meta-llama/",
    )
    refused("./models/x", r"\./models/x: no such file or folder$")
    refused("x.gguf", r"x\.gguf: no such file or folder$")


def test_a_file_is_taken_as_it_is_and_needs_no_lineage(gguf, tmp_path, same_bits):
    own = put(gguf, tmp_path / "downloads" / "tiny.Q8_0.gguf")
    (own.parent / "herd.json").write_text("not this file's")
    expected = checkpoint.load_model(gguf)
    assert checkpoint.load_lineage(own) is None
    assert checkpoint.load_config(str(own)) == expected.config
    assert checkpoint.load_tokenizer(own) is not None
    assert checkpoint.load_model(own).config == expected.config
    assert checkpoint.checkpoint_hash(own) == checkpoint.checkpoint_hash(gguf)
    assert sources.model_name(own) == "tiny.Q8_0"


def test_a_folder_with_one_gguf_file_is_that_file(gguf, tmp_path):
    folder = put(gguf, tmp_path / "folder" / "a.gguf").parent
    put(gguf, folder / "mmproj-a.gguf")  # the part of a multimodal release that sees images
    assert checkpoint.load_config(folder) == checkpoint.load_config(gguf)
    put(gguf, folder / "b.gguf")
    with pytest.raises(CheckpointError, match=r"holds several GGUF files \(a.gguf, b.gguf\); name one"):
        checkpoint.load_config(folder)


def test_any_part_of_a_split_file_opens_all(tmp_path):
    cases = Path(os.environ.get("HERD_TEST_CASES", "missing"))
    if not cases.exists():
        pytest.skip("needs HERD_TEST_CASES")
    first, second = (
        put(cases / name, tmp_path / name) for name in ("m-00001-of-00002.gguf", "m-00002-of-00002.gguf")
    )
    assert sources.resolve_model(second) == first
    hashes = {checkpoint.checkpoint_hash(path) for path in (first, second, tmp_path)}
    assert len(hashes) == 1
    checkpoint.load_model(second)
    checkpoint.export_gguf(second, tmp_path / "whole.gguf")
    assert checkpoint.load_config(tmp_path / "whole.gguf") == checkpoint.load_config(first)
    (tmp_path / "whole.gguf").unlink()
    first.unlink()
    refused(str(second), "its first part m-00001-of-00002.gguf is missing; put it there")


def test_what_cannot_be_a_model_as_it_is_comes_with_the_cure(tmp_path):
    meta = tmp_path / "Meta-Llama"
    meta.mkdir()
    (meta / "params.json").write_text("{}")
    refused(str(meta), f"is in Meta's own layout; convert it once: herd import {meta} FOLDER")
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "model.safetensors").write_bytes(b"")
    refused(
        str(tmp_path / "w" / "model.safetensors"), f"is a part of a model; give its folder: {tmp_path / 'w'}"
    )
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_model.safetensors").write_bytes(b"")
    refused(str(tmp_path / "lora"), "has only an adapter")


def test_models_of_ollama_are_listed_and_opened_without_a_copy(gguf, home, capsys):
    root = home / ".ollama" / "models"
    blob = put(gguf, root / "blobs" / "sha256-abc")
    for name in (
        "registry.ollama.ai/library/tiny/latest",
        "registry.ollama.ai/someone/other/1b",
        "broken/x/y/z",
    ):
        manifest = root / "manifests" / name
        manifest.parent.mkdir(parents=True)
        layer = {"mediaType": "application/vnd.ollama.image.model", "digest": "sha256:abc"}
        manifest.write_text(
            json.dumps({"layers": [{"mediaType": "x"}, layer]}) if "broken" not in name else "{"
        )
    assert sources.resolve_model("ollama:tiny") == sources.resolve_model("ollama:tiny:latest") == blob
    assert sources.model_name(blob) == "tiny:latest"
    assert checkpoint.load_config("ollama:tiny") == checkpoint.load_config(gguf)
    refused("ollama:nothing", "Ollama keeps no such model here; it has ollama:tiny:latest")
    assert run(["list"]) == 0
    assert "ollama:tiny:latest" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="is kept by Ollama; delete it there"):
        remove_model("ollama:tiny:latest", lambda nbytes: True)


def test_models_of_the_hubs_cache_and_lm_studio_are_listed(gguf, home, capsys, make_model):
    snapshot = home / ".cache" / "huggingface" / "hub" / "models--org--small" / "snapshots" / "abc"
    checkpoint.save_model(snapshot, make_model())
    put(gguf, snapshot.parents[2] / "models--org--files" / "snapshots" / "abc" / "sub" / "x.Q8_0.gguf")
    partly = snapshot.parents[2] / "models--org--partly" / "snapshots" / "abc"
    checkpoint.save_model(partly, make_model())
    (partly / "model.safetensors").unlink()
    (partly / "model.safetensors").symlink_to("../../blobs/gone")
    lm_studio = put(gguf, home / ".lmstudio" / "models" / "org" / "name" / "y.gguf")
    assert run(["list", "--json"]) == 0
    found = {model["name"]: model for model in json.loads(capsys.readouterr().out)["local"]}
    assert found.keys() == {"hf:org/small", "hf:org/files/sub/x.Q8_0.gguf", str(lm_studio)}
    assert found["hf:org/small"]["bytes"] == (snapshot / "model.safetensors").stat().st_size
    assert sources.model_name(Path(found["hf:org/small"]["path"])) == "small"


def test_files_of_other_architectures_are_not_listed(home):
    lm_studio = home / ".lmstudio" / "models" / "org" / "name"
    lm_studio.mkdir(parents=True)
    write_gguf(lm_studio / "other.gguf", [("general.architecture", "STRING", "qwen2")], {}, lambda name: [])
    (lm_studio / "text.gguf").write_text("not a model")
    assert catalogue.local_models() == []


def test_a_downloaded_model_is_removed(home, monkeypatch, capsys):
    snapshot = home / ".cache" / "huggingface" / "hub" / "models--org--small" / "snapshots" / "abc"
    blob = snapshot.parents[1] / "blobs" / "0"
    blob.parent.mkdir(parents=True)
    blob.write_bytes(b"x" * 1000)
    assert run(["rm", "hf:org/small"]) == 1
    assert "which other programs use too; give --yes" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("typer.confirm", lambda question: print(question))  # None, as False: no
    assert run(["rm", "hf:org/small"]) == 0
    shown = capsys.readouterr().out
    assert "frees 1.00 kB in Hugging Face's cache, which other programs use too; continue?" in shown
    assert "hf:org/small was kept" in shown
    assert blob.exists()
    monkeypatch.setattr("typer.confirm", lambda question: True)
    assert run(["rm", "hf:org/small"]) == 0
    assert "removed hf:org/small" in capsys.readouterr().out
    assert not snapshot.parents[1].exists()
    blob.parent.mkdir(parents=True)
    blob.write_bytes(b"x" * 1000)
    assert run(["rm", "hf:org/small", "--yes"]) == 0
    assert not snapshot.parents[1].exists()
    assert run(["rm", "hf:org/small"]) == 1
    assert "is not in the hub's cache" in capsys.readouterr().err
    for name in ("smollm2", "nothing", "../x", "."):
        assert run(["rm", name]) == 1
        assert "is not among the models that herd pulled" in capsys.readouterr().err


def test_pull_prints_where_the_model_is(gguf, capsys):
    assert run(["pull", str(gguf)]) == 0
    assert capsys.readouterr().out.strip() == str(gguf)


def test_an_unknown_pre_tokenizer_can_be_named(gguf, tmp_path, capsys):
    own = tmp_path / "own.gguf"
    own.write_bytes(gguf.read_bytes().replace(b"llama-bpe", b"llama-xyz"))
    assert run(["chat", str(own), "-p", "x", "--complete", "--max-tokens", "1"]) == 1
    assert (
        "pre-tokenizer is 'llama-xyz', which is not known; name one that fits (--pre of"
        in capsys.readouterr().err
    )
    expected = checkpoint.load_tokenizer(gguf)
    assert checkpoint.ModelSource(own, pre="llama-bpe").tokenizer.encode("again and") == expected.encode(
        "again and"
    )


def test_a_tokenizer_is_read_without_importing_torch(gguf):
    code = (
        "import sys\nfrom herd.checkpoint import ModelSource\n"
        f"source = ModelSource({str(gguf)!r})\n"
        "print(source.tokenizer.vocab_size > 0, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["True", "False"], done.stderr
