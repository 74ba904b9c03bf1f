"""Damaged and hostile files are refused in one line, and nothing is allocated for what they claim."""

import struct
import warnings

import pytest
import torch
from damage import fuzz

import herd.checkpoint as checkpoint
from herd.checkpoint.gguf import GGUF
from herd.checkpoint.gguf_config import model_metadata
from herd.checkpoint.gguf_write import write_gguf
from herd.errors import CheckpointError
from herd.llama import SIZES
from herd.quant import TYPES, scheme
from herd.quant.formats import F32, Q4_0

SHAPE = {
    "dim": 64, "n_heads": 2, "n_kv_heads": 1, "ffn_dim": 96, "head_dim": 0, "vocab_size": 540,
    "n_layers": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def quantized(plain):
    folder = plain.parent / "q"
    checkpoint.quantize_folder(checkpoint.ImportSource(plain), folder, scheme("q4"))
    return folder


@pytest.fixture(scope="module")
def whole(plain):
    """A file's bytes."""
    out = plain.parent / "whole.gguf"
    checkpoint.export_gguf(plain, out, "q4")
    return out.read_bytes()


@pytest.fixture
def refused(tmp_path):
    """refused(bytes, *words): opening or importing raises CheckpointError in one line with the words."""

    def check(data: bytes, *words: str) -> None:
        path = tmp_path / "bad.gguf"
        path.write_bytes(data)
        with pytest.raises(CheckpointError) as error, warnings.catch_warnings():  # noqa: PT012
            warnings.simplefilter("ignore")
            checkpoint.import_gguf(path, tmp_path / "out")
        text = str(error.value)
        assert "\n" not in text
        assert "bad.gguf" in text
        for word in words:
            assert word in text, text
        assert not (tmp_path / "out").exists()

    return check


def build(
    metadata=(), tensors=(), *, version=3, n_tensors=None, n_values=None, tail=b"\0" * 4096, alignment=32
):
    """Build a file by hand: metadata as (key, type, bytes), tensors as (name, dims, type, offset)."""
    parts = [b"GGUF", struct.pack("<I", version)]
    parts.append(struct.pack("<Q", len(tensors) if n_tensors is None else n_tensors))
    parts.append(struct.pack("<Q", len(metadata) if n_values is None else n_values))
    for key, code, raw in metadata:
        parts += [text(key), struct.pack("<I", code), raw]
    for name, dims, code, offset in tensors:
        parts += [
            text(name),
            struct.pack(f"<I{len(dims)}Q", len(dims), *dims),
            struct.pack("<IQ", code, offset),
        ]
    data = b"".join(parts)
    return data + b"\0" * (-len(data) % alignment) + tail


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


ARCHITECTURE = ("general.architecture", 8, text("llama"))


def test_a_file_by_hand_is_sound(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(build([ARCHITECTURE], [("a", (4, 2), 0, 0), ("b", (32,), 8, 32)], tail=b"\0" * 96))
    file = GGUF(path)
    assert file.metadata == {"general.architecture": "llama"}
    assert {n: (e.shape, e.nbytes) for n, e in file.tensors.items()} == {"a": ((2, 4), 32), "b": ((32,), 34)}
    assert file.rows("a").shape == (2, 16)


def test_a_file_truncated_in_any_section_is_refused(whole, refused, tmp_path):
    path = tmp_path / "whole.gguf"
    path.write_bytes(whole)
    file = GGUF(path)
    header = file.header_bytes
    starts = [entry.start for entry in file.tensors.values()]
    points = [0, 1, 3, 4, 8, 16, 23, 24, 30, header // 2, header - 1, header, *starts, len(whole) - 33]
    for point in points:
        refused(whole[:point])
    refused(whole + b"\0" * 64, "bytes follow the last tensor")


HUGE = (2**63, 2**64 - 1, 2**31)


@pytest.mark.parametrize("number", HUGE)
def test_counts_beyond_the_file_are_refused(refused, number):
    refused(build(n_tensors=number), f"{number} tensors do not fit")
    refused(build(n_values=number), f"{number} metadata values do not fit")


@pytest.mark.parametrize("number", HUGE)
def test_lengths_beyond_the_file_are_refused(refused, number):
    long = struct.pack("<Q", number)
    refused(build([("a", 8, long)]), f"a takes {number} bytes")
    refused(build([("a", 9, u32(4) + long)]), "elements of a do not fit")
    refused(build([("a", 9, u32(8) + long)]), "elements of a do not fit")
    refused(build([("a", 9, u32(8) + struct.pack("<Q", 2) + text("x") + long)]), "text 1 of a is beyond")
    data = bytearray(build([ARCHITECTURE]))
    data[24:32] = long
    refused(bytes(data), "metadata key 0")
    data = bytearray(build([], [("a", (4,), 0, 0)]))
    data[24:32] = long
    refused(bytes(data), "the name of tensor 0")


def test_impossible_dimensions_are_refused(refused):
    big = 2**32
    refused(build([], [("a", (big, big), 0, 0)]), f"shape [{big}, {big}] takes {4 * big * big} bytes")
    refused(build([], [("a", (2**63, 2**63, 2**63, 2**63), 8, 0)]), "takes")  # 0 in 64 bits
    refused(build([], [("a", (32, 2**59), 2, 0)]), "takes")
    refused(build([], [("a", (0, 4), 0, 0)]), "does not divide")
    refused(build([], [("a", (33,), 2, 0)]), "does not divide into Q4_0 blocks")
    refused(build([], [("a", (), 0, 0)]), "has 0 dimensions")
    refused(build([], [("a", (1,) * 5, 0, 0)]), "has 5 dimensions")
    refused(build([], [("a", (4,), 0, 0)], n_tensors=1)[:60], "truncated")


def test_tensors_that_overlap_or_leave_gaps_are_refused(refused):
    for offset in (4096, 2**63, 2**64 - 32):
        refused(build([], [("a", (4,), 0, offset)]), "does not follow the header")
    refused(build([], [("a", (512,), 0, 0), ("b", (4,), 0, 1024)]), "b at", "overlaps a")
    refused(build([], [("a", (8,), 0, 0), ("b", (8,), 0, 0)]), "overlaps a")
    refused(build([], [("a", (8,), 0, 0), ("b", (8,), 0, 64)]), "does not follow a")
    refused(build([], [("a", (8,), 0, 0), ("b", (1024,), 0, 32)]), "truncated: b ends at")
    refused(build([], [("a", (9,), 0, 0), ("b", (8,), 0, 36)], tail=b"\0" * 68), "b at")


@pytest.mark.parametrize("value", [0, 3, 24, 2**32 - 1])
def test_impossible_alignments_are_refused(refused, value):
    refused(build([("general.alignment", 4, u32(value))]), f"general.alignment={value} is not a power of two")
    refused(build([("general.alignment", 6, struct.pack("<f", 32.0))]), "not a power of two")


def test_another_alignment_is_read(tmp_path):
    path = tmp_path / "x.gguf"
    tensors = [("a", (4,), 0, 0), ("b", (4,), 0, 256)]
    path.write_bytes(build([("general.alignment", 4, u32(256))], tensors, alignment=256, tail=b"\0" * 272))
    assert GGUF(path).tensors["b"].start % 256 == 0


def test_names_that_appear_twice_are_refused(refused):
    refused(build([ARCHITECTURE, ARCHITECTURE]), "general.architecture is there twice")
    refused(build([], [("a", (4,), 0, 0), ("a", (4,), 0, 32)]), "tensor a is there twice")


def test_unknown_types_are_refused(refused):
    refused(build([], [("a", (4,), 77, 0)]), "a has unknown type 77")
    refused(build([], [("a", (4,), 4, 0)]), "a has unknown type 4")  # Q4_2, removed long ago
    refused(build([("a", 13, b"")]), "a has unknown value type 13")
    refused(build([("a", 9, u32(13) + struct.pack("<Q", 1))]), "array of unknown type 13")


def test_malformed_values_are_refused(refused):
    refused(build([("a", 7, b"\2")]), "truth value of 2")
    refused(build([("a", 9, u32(7) + struct.pack("<Q", 2) + b"\1\3")]), "truth values other than")
    refused(build([("a", 8, text(b"\xff\xfe"))]), "a is not UTF-8")
    refused(build([(b"\xff", 4, u32(1))]), "metadata key 0 is not UTF-8")
    refused(build([("", 4, u32(1))]), "metadata key 0 is ''")
    refused(build([("a" * 70_000, 4, u32(1))]), "at most 65535")
    refused(build([], [("a" * 64, (4,), 0, 0)]), "at most 63")
    refused(build([], [("", (4,), 0, 0)]), "the name of tensor 0 is ''")
    deep = u32(9) + struct.pack("<Q", 1)
    refused(build([("a", 9, deep * 1000)]), "nested deeper than 4")


def test_other_versions_are_refused(refused):
    refused(build(version=1), "GGUF version 1 is not read")
    refused(build(version=4), "GGUF version 4 is not read")
    refused(build(version=3 << 24), "big-endian")
    refused(b"GGML" + build()[4:], "begins with b'GGML'")
    refused(b"", "0 bytes")


def test_version_2_is_read(tmp_path):
    (tmp_path / "x.gguf").write_bytes(build([ARCHITECTURE], version=2))
    assert GGUF(tmp_path / "x.gguf").metadata


def test_a_path_that_is_not_a_file_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "no.gguf"):
        with pytest.raises(CheckpointError, match="cannot read"):
            GGUF(path)


@pytest.fixture
def rewritten(whole, tmp_path, plain):
    """rewritten(metadata={}, tensors={}) -> bytes of the file with some values and tensors changed; None
    removes."""
    (tmp_path / "source.gguf").write_bytes(whole)
    file = GGUF(tmp_path / "source.gguf")

    def make(metadata=None, tensors=None):
        values = {k: (k, letter, v) for k, letter, v in model_metadata(checkpoint.load_config(plain))}
        values["general.architecture"] = ("general.architecture", "STRING", "llama")
        values |= {k: (k, *v) if v else None for k, v in (metadata or {}).items()}
        plan = {n: (e.shape, e.format) for n, e in file.tensors.items()}
        rows = {n: file.rows(n) for n in file.tensors}
        for name, change in (tensors or {}).items():
            if change is None:
                del plan[name]
            else:
                plan[name], rows[name] = change
        write_gguf(tmp_path / "new.gguf", [v for v in values.values() if v], plan, lambda n: [rows[n]])
        return (tmp_path / "new.gguf").read_bytes()

    return make


def test_other_models_are_refused_by_key(refused, rewritten):
    refused(
        rewritten({"general.architecture": ("STRING", "qwen2")}),
        "architecture 'qwen2' cannot be run; only 'llama'",
    )
    nameless = rewritten().replace(b"general.architecture", b"general.architectura")
    refused(nameless, "general.architecture is missing")
    refused(rewritten({"general.architecture": ("UINT32", 7)}), "general.architecture is a int, not a str")
    refused(rewritten({"llama.expert_count": ("UINT32", 8)}), "llama.expert_count=8 cannot be run")
    refused(rewritten({"llama.rope.scaling.type": ("STRING", "longrope")}), "scaling.type='longrope'")
    refused(rewritten({"llama.block_count": None}), "llama.block_count is missing")
    refused(rewritten({"llama.block_count": ("UINT32", 2)}), "blk.1.attn_q.weight is missing")
    refused(
        rewritten({"llama.block_count": ("UINT32", 2**32 - 1)}), "llama.block_count=4294967295, but it has"
    )
    refused(rewritten({"llama.block_count": ("UINT32", 0)}), "n_layers=0 must be")
    refused(rewritten({"llama.embedding_length": ("UINT32", 2**31)}), "has shape [540, 64]")
    refused(rewritten({"llama.attention.key_length": ("UINT32", 2**32 - 2)}), "value_length differs")
    refused(rewritten({"llama.attention.head_count": ("[UINT32", [2])}), "is a tuple, not a int")
    refused(rewritten({"llama.attention.layer_norm_rms_epsilon": ("FLOAT32", float("nan"))}), "norm_eps")
    refused(rewritten({"llama.vocab_size": ("UINT32", 7)}), "llama.vocab_size is not the 540 rows")
    refused(
        rewritten({"llama.rope.dimension_count": ("UINT32", 16)}),
        "rope.dimension_count=16 is not head_dim=32",
    )


def test_missing_extra_and_misshapen_tensors_are_refused(refused, rewritten):
    refused(rewritten(tensors={"blk.0.attn_k.weight": None}), "blk.0.attn_k.weight is missing")
    refused(rewritten(tensors={"token_embd.weight": None}), "token_embd.weight is missing")
    extra = ((64,), F32), torch.zeros(256, dtype=torch.uint8)
    refused(rewritten(tensors={"blk.0.attn_q_norm.weight": extra}), "unexpected tensor blk.0.attn_q_norm")
    for bias, missing in (
        ("blk.0.attn_q.bias", "blk.0.attn_k.bias"),
        ("blk.1.attn_q.bias", "blk.0.attn_q.bias"),
        ("blk.0.attn_output.bias", "blk.0.attn_q.bias"),
        ("blk.1.ffn_down.bias", "blk.0.ffn_gate.bias"),
    ):
        refused(rewritten(tensors={bias: extra}), f"{missing} is missing; biases in only some layers")
    refused(rewritten(tensors={"blk.0.attn_norm.bias": extra}), "unexpected tensor blk.0.attn_norm.bias")
    refused(rewritten(tensors={"output_norm.weight": (((32,), F32), extra[1][:128])}), "shape [32], not [64]")
    ints = ((64,), TYPES["I32"]), extra[1]
    refused(
        rewritten(tensors={"output_norm.weight": ints}),
        "output_norm.weight is I32, which is not a type for weights",
    )


@pytest.mark.parametrize("scale", [0x7C00, 0xFC00, 0x7E01], ids=["inf", "-inf", "nan"])
def test_scales_that_are_not_finite_are_refused(refused, rewritten, scale, whole, tmp_path):
    (tmp_path / "s.gguf").write_bytes(whole)
    rows = GGUF(tmp_path / "s.gguf").rows("blk.0.ffn_down.weight").clone()
    rows[63, 36:38] = torch.frombuffer(bytearray(struct.pack("<H", scale)), dtype=torch.uint8)
    change = {"blk.0.ffn_down.weight": (((64, 96), Q4_0), rows)}
    refused(rewritten(tensors=change), "blk.0.ffn_down.weight has values that are not finite")
    norm = torch.full((64,), float("inf")).view(torch.uint8)
    refused(rewritten(tensors={"output_norm.weight": (((64,), F32), norm)}), "output_norm.weight has values")


def test_malformed_tokenizers_are_dropped_with_the_reason(rewritten, tmp_path):
    """The weights are imported. The tokenizer is dropped, with the reason."""
    kinds = {
        "tokens": "[STRING",
        "token_type": "[INT32",
        "merges": "[STRING",
        "model": "STRING",
        "pre": "STRING",
    }
    one = {"tokens": ["a"], "token_type": [1]}
    for change, reason in (
        ({"tokens": ["a", "a"], "token_type": [1, 1]}, "in the vocabulary twice"),
        ({"tokens": ["a", "b"], "token_type": [1]}, "1 token types"),
        (one | {"merges": ["a b"]}, "the merge 'a b' needs a token"),
        ({"model": "rwkv"}, "of the kind 'rwkv'"),
        (one | {"merges": ["a a"], "pre": "no-such"}, "'no-such', which is not known; name one"),
    ):
        fields = {"model": "gpt2", "pre": "llama-bpe"} | change
        written = {f"tokenizer.ggml.{name}": (kinds[name], value) for name, value in fields.items()}
        (tmp_path / "t.gguf").write_bytes(rewritten(written))
        with pytest.warns(UserWarning, match=f"tokenizer cannot be used here: .*{reason}"):
            checkpoint.import_gguf(tmp_path / "t.gguf", tmp_path / "t")


def test_weights_larger_than_memory_are_refused_with_what_would_fit(plain, quantized, monkeypatch):
    """They are refused before a tensor is read, with the formats that would fit."""
    from herd.checkpoint import memory

    config = checkpoint.load_config(plain)
    small = scheme("q8").nbytes(config)
    monkeypatch.setattr(memory, "available_memory", lambda: small)
    with pytest.raises(
        CheckpointError,
        match=r"need [\d.]+ kB of memory.*herd quantize --to Q8_0 .* or --to Q4_0 .* would fit",
    ):
        checkpoint.load_model(plain)
    monkeypatch.setattr(memory, "available_memory", lambda: 1000)
    for folder in (plain, quantized):
        with pytest.raises(CheckpointError, match="take a smaller model or a larger machine"):
            checkpoint.load_model(folder)


def test_sizes_of_quantized_formats():
    from herd.checkpoint import memory

    config = SIZES["8B"]
    assert {k: round(v / 1e9, 1) for k, v in memory.quantized_nbytes(config).items()} == {
        "Q8_0": 8.5,
        "Q4_K_M": 4.9,
        "Q4_0": 4.7,
    }


# Fuzz: a mutated file is refused in one line, or gives the same model.


def test_a_mutated_gguf_is_refused_or_harmless(quantized, tmp_path):
    counts = fuzz(quantized, "model.gguf", range(200), tmp_path)
    assert counts["refused"] > 150


def test_mutated_safetensors_are_refused_or_harmless(plain, tmp_path):
    counts = fuzz(plain, "model.safetensors", range(100), tmp_path)
    assert counts["refused"] > 75
