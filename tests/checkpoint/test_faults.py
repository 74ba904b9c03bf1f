"""Damaged, misleading and hostile folders are refused in one line. Nothing is allocated or overwritten."""

import json
import os
import shutil
import struct
import warnings

import pytest
import torch
from damage import Bomb
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import herd.checkpoint as checkpoint
from herd.checkpoint import weights
from herd.errors import CheckpointError
from herd.llama.model import LlamaLM


@pytest.fixture(scope="module")
def whole(tmp_path_factory, make_model):
    folder = tmp_path_factory.mktemp("whole") / "single"
    checkpoint.save_model(folder, make_model())
    return folder


@pytest.fixture(scope="module")
def sharded(tmp_path_factory, make_model):
    folder = tmp_path_factory.mktemp("whole") / "sharded"
    checkpoint.save_model(folder, make_model(), max_shard_bytes=60_000)
    return folder


@pytest.fixture
def copy(tmp_path):
    def make(folder):
        return shutil.copytree(folder, tmp_path / folder.name)

    return make


def refused(folder, *named):
    """Assert that loading and hashing raise CheckpointError in one line that contains ``named``."""
    for use in (checkpoint.load_model, checkpoint.checkpoint_hash):
        with pytest.raises(CheckpointError) as error:
            use(folder)
        text = str(error.value)
        assert "\n" not in text
        for name in named:
            assert name in text


def header_of(path):
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_raw(path, header, body):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def test_a_file_truncated_anywhere_is_refused(whole, copy):
    folder = copy(whole)
    path = folder / "model.safetensors"
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    middle, end = 8 + length // 2, 8 + length
    for point in (0, 1, 7, 8, 9, middle, end - 1, end, end + 1, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:point])
        refused(folder, "model.safetensors", "truncated")
    path.write_bytes(data + b"\0")
    refused(folder, "model.safetensors")


@pytest.mark.parametrize("length", [0, 1, 2**31, 2**63, 2**64 - 1])
def test_a_wrong_header_length_is_refused(whole, copy, length):
    folder = copy(whole)
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    refused(folder, "model.safetensors")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_flipped_header_byte_is_refused_or_harmless(whole, tmp_path, data):
    """Fuzz: a changed header either fails in one line, or describes the same tensors."""
    folder = tmp_path / "fuzz"
    if not folder.exists():
        shutil.copytree(whole, folder)
    original = (whole / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", original[:8])
    damaged = bytearray(original)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, 8 + length - 1))] = data.draw(st.integers(0, 255))
    (folder / "model.safetensors").write_bytes(damaged)
    try:
        model = checkpoint.load_model(folder)
    except CheckpointError as error:
        assert "\n" not in str(error)  # noqa: PT017 (either outcome is right)
        return
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == dict(model.config.param_shapes())


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"[" * 5000,
        b'{"a": 1}',
        b'{"a": {"dtype": "F32"}}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "Q4", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "a": {"dtype": "F32"}}',
    ],
)
def test_a_corrupt_header_is_refused(whole, copy, header):
    folder = copy(whole)
    write_raw(folder / "model.safetensors", header, b"\0" * 4)
    refused(folder, "model.safetensors")


def change_entry(folder, name, **changes):
    header, body = header_of(folder / "model.safetensors")
    header[name] |= changes
    write_raw(folder / "model.safetensors", header, body)


def test_overlapping_and_oversized_ranges_are_refused(whole, copy):
    folder = copy(whole)
    header, _ = header_of(folder / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    change_entry(folder, name, data_offsets=header["model.layers.0.self_attn.k_proj.weight"]["data_offsets"])
    refused(folder, "corrupt")
    shutil.rmtree(folder)
    folder = copy(whole)
    change_entry(folder, name, shape=[10**12, 48])  # 192 TB: refused from its header, nothing allocated
    refused(folder, "corrupt")


def rewrite(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


def test_missing_extra_and_misshapen_tensors_are_named(whole, copy, tmp_path):
    projection, bias = "model.layers.{}.mlp.down_proj.weight", "model.layers.0.self_attn.q_proj.bias"
    norm, head = "model.norm.weight", "lm_head.weight"
    for change, *named in (
        (lambda state: state.update({norm: torch.ones(49)}), norm, "[49]", "[48]"),
        (lambda state: state.pop(projection.format(1)), projection.format(1), "missing"),
        (lambda state: state.update({projection.format(2): torch.ones(2)}), "unexpected", "model.layers.2"),
        (lambda state: state.update({bias: torch.ones(48)}), "unexpected", "bias"),
        (lambda state: state.update({head: state[head].to(torch.int8)}), head, "I8"),
    ):
        folder = copy(whole)
        rewrite(folder, change)
        refused(folder, *named)
        shutil.rmtree(folder)


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize(
    "name",
    ["0.self_attn.q_proj", "1.self_attn.v_proj", "1.self_attn.o_proj", "0.mlp.gate_proj", "1.mlp.down_proj"],
)
def test_biases_in_only_some_layers_or_projections_are_refused(make_model, tmp_path, flag, name):
    """A bias too few if the configuration has them, and one too many if it does not."""
    kind = "mlp_bias" if ".mlp." in name else "attention_bias"
    bias = f"model.layers.{name}.bias"
    checkpoint.save_model(tmp_path / "m", make_model(**{kind: flag}))
    size = load_file(tmp_path / "m" / "model.safetensors")[bias.replace(".bias", ".weight")].shape[0]
    rewrite(tmp_path / "m", lambda state: state.pop(bias) if flag else state.update({bias: torch.ones(size)}))
    refused(tmp_path / "m", bias, f"{kind} in config.json and the weights do not fit", "only some layers")


def test_the_config_of_another_model_is_refused(whole, copy):
    folder = copy(whole)
    data = json.loads((folder / "config.json").read_text())
    for change, named in (
        ({"num_hidden_layers": 3}, "model.layers.2."),
        ({"num_hidden_layers": 1}, "unexpected tensor model.layers.1."),
        ({"hidden_size": 96}, "[600, 96]"),
        ({"tie_word_embeddings": True}, "lm_head.weight is not the embedding; set it to false"),
    ):
        (folder / "config.json").write_text(json.dumps(data | change))
        refused(folder, named)
    (folder / "config.json").unlink()
    refused(folder, "config.json", "no such file")


def test_nothing_is_allocated_for_a_bad_folder(whole, copy, monkeypatch):
    folder = copy(whole)
    rewrite(folder, lambda state: state.pop("model.norm.weight"))

    def never(*_, **__):
        raise AssertionError("a tensor was read or a model built before all headers were checked")

    monkeypatch.setattr(weights, "read_tensor", never)
    monkeypatch.setattr(LlamaLM, "__init__", never)
    refused(folder, "model.norm.weight is missing")


def test_missing_mixed_and_hostile_shards_are_refused(sharded, copy):
    index = json.loads((sharded / weights.INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    name = next(iter(index["weight_map"]))

    def change_map(folder, **changes):
        (folder / weights.INDEX).write_text(json.dumps(index | {"weight_map": index["weight_map"] | changes}))

    size = (sharded / files[1]).stat().st_size
    for damage, *named in (
        (lambda folder: (folder / files[2]).unlink(), files[2], "missing"),
        (lambda folder: os.truncate(folder / files[1], size - 1), files[1], "truncated"),
        (lambda folder: shutil.copy(sharded / files[0], folder / files[1]), "both"),
        (lambda folder: shutil.copy(sharded / files[0], folder / weights.SINGLE), "stale"),
        (lambda folder: change_map(folder, **{name: files[-1]}), name),
        (lambda folder: change_map(folder, extra=files[0]), "extra", "lacks it"),
        (lambda folder: change_map(folder, **{name: "../../x.safetensors"}), "refused"),
        (lambda folder: change_map(folder, **{name: "/etc/passwd"}), "refused"),
        (lambda folder: change_map(folder, **{name: "a/b.safetensors"}), "refused"),
        (lambda folder: change_map(folder, **{name: ".hidden.safetensors"}), "refused"),
        (lambda folder: change_map(folder, **{name: "pytorch_model.bin"}), "refused"),
        (lambda folder: change_map(folder, **{name: 7}), "refused"),
        (lambda folder: (folder / weights.INDEX).write_text("{}"), "weight_map"),
        (lambda folder: (folder / weights.INDEX).write_text("[]"), "not a JSON object"),
        (lambda folder: (folder / weights.INDEX).write_text("{"), "JSON"),
    ):
        folder = copy(sharded)
        damage(folder)
        refused(folder, *named)
        shutil.rmtree(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickles_are_never_opened(whole, copy, name):
    folder = copy(whole)
    (folder / "model.safetensors").unlink()
    torch.save({"x": Bomb()}, folder / name)
    refused(folder, name, "can run code")


def test_a_pickle_named_safetensors_is_refused(whole, copy):
    folder = copy(whole)
    torch.save({"x": Bomb()}, folder / "model.safetensors")
    refused(folder, "model.safetensors")


def test_an_empty_folder_is_refused(tmp_path):
    refused(tmp_path, "config.json")


def test_linked_files_are_followed(whole, tmp_path):
    """The cache of huggingface_hub consists of symbolic links."""
    folder = tmp_path / "snapshot"
    folder.mkdir()
    for file in whole.iterdir():
        (folder / file.name).symlink_to(file)
    assert checkpoint.checkpoint_hash(folder) == checkpoint.checkpoint_hash(whole)


def test_a_folder_replaced_while_it_is_read_is_noticed(whole, copy, make_model, monkeypatch):
    folder = copy(whole)
    read = weights.read_tensor
    swapped = []

    def read_and_swap(info):
        if not swapped:
            swapped.append(checkpoint.save_model(folder, make_model(seed=1)))
        return read(info)

    monkeypatch.setattr(weights, "read_tensor", read_and_swap)
    with pytest.raises(CheckpointError, match="was replaced while it was being read"):
        checkpoint.load_model(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checkpoint.load_model(folder)
