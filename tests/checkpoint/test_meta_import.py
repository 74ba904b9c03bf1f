"""Meta's layout in, against Meta's own way of computing: interleaved complex rotations, model-parallel
pieces."""

import json
import warnings

import pytest
import torch
import torch.nn.functional as F
from damage import Bomb

import herd.checkpoint as checkpoint
from herd import cli
from herd.checkpoint import meta, names
from herd.checkpoint.lineage import load_lineage
from herd.errors import CheckpointError
from herd.llama import rope
from herd.llama.config import SIZES, ModelConfig, RopeScaling
from herd.llama.model import LlamaLM

# FFN width by Meta's rule: int(2/3 * 4 * 64) = 170, * 1.3 = 221, up to a multiple of 32 = 224.
CONFIG = ModelConfig(96, 64, 2, 8, 4, 224, rope_scaling=RopeScaling(), max_context=131_072)
PARAMS = {
    "dim": 64, "ffn_dim_multiplier": 1.3, "multiple_of": 32, "n_heads": 8, "n_kv_heads": 4, "n_layers": 2,
    "norm_eps": 1e-05, "rope_theta": 500000.0, "use_scaled_rope": True, "vocab_size": 96,
}  # fmt: skip
SHAPES_8B = {
    "dim": 4096,
    "n_layers": 32,
    "n_heads": 32,
    "n_kv_heads": 8,
    "ffn_dim_multiplier": 1.3,
    "multiple_of": 1024,
}
SHAPE_405B = {"dim": 16384, "n_layers": 126, "n_heads": 128, "ffn_dim_multiplier": 1.2, "multiple_of": 4096}


def make(seed: int = 0, **changes) -> LlamaLM:
    model = LlamaLM(CONFIG.replace(**changes)).init_weights(seed, std=0.2)
    with torch.no_grad():
        for i, param in enumerate(p for p in model.parameters() if p.ndim == 1):
            param.copy_(torch.rand(param.shape, generator=torch.Generator().manual_seed(i)) + 0.5)
    return model.eval()


def meta_state(model: LlamaLM) -> dict[str, torch.Tensor]:
    state = {}
    for name, param in model.named_parameters():
        state[names.meta_name(name)] = names.to_pairs(name, param.detach(), model.config.head_dim)
    return state


def write(
    folder,
    model,
    pieces=1,
    *,
    repeats=1,
    embedding_dim=0,
    dtype=torch.float32,
    params=PARAMS,
    change=lambda i, piece: {},
):
    """Split a model like Meta's model-parallel release."""
    folder.mkdir()
    state = {name: tensor.to(dtype) for name, tensor in meta_state(model).items()}
    K = model.config.head_dim
    for i in range(pieces):
        piece = {}
        for name, tensor in state.items():
            if tensor.ndim == 1:
                piece[name] = tensor
                continue
            if name.endswith(("wk.weight", "wv.weight")):
                tensor = tensor.view(-1, K, tensor.shape[1]).repeat_interleave(repeats, 0).flatten(0, 1)
            dim = 1 if name.endswith(("wo.weight", "w2.weight")) else 0
            dim = embedding_dim if name.startswith("tok_") else dim
            piece[name] = tensor.chunk(pieces, dim)[i].clone()
        piece |= change(i, piece)
        torch.save(piece, folder / f"consolidated.{i:02}.pth")
    (folder / "params.json").write_text(json.dumps(params))
    return folder


def imported(source, out, **options) -> LlamaLM:
    with pytest.warns(UserWarning, match=r"has no tokenizer\.model|does not state a context"):
        checkpoint.import_meta(source, out, **options)
    return checkpoint.load_model(out)


def metas_forward(state, config: ModelConfig, tokens_BT):
    """Meta's reference forward on Meta's names and layout: complex numbers, repeated KV heads, explicit
    softmax."""
    B, T = tokens_BT.shape
    H, G, K = config.n_heads, config.n_kv_heads, config.head_dim
    turns_TK2 = torch.polar(
        torch.ones(T, K // 2), torch.outer(torch.arange(T).float(), rope.inverse_frequencies(config))
    )

    def norm(x, weight):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + config.norm_eps) * weight

    def rotate(x):
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], K // 2, 2))
        return torch.view_as_real(pairs * turns_TK2[None, :, None]).flatten(-2)

    mask_TT = torch.full((T, T), float("-inf")).triu(1)
    h = state["tok_embeddings.weight"][tokens_BT]
    for i in range(config.n_layers):
        w = {
            name.split(".", 2)[2]: tensor for name, tensor in state.items() if name.startswith(f"layers.{i}.")
        }
        x = norm(h, w["attention_norm.weight"])
        q = rotate((x @ w["attention.wq.weight"].T).view(B, T, H, K)).transpose(1, 2)
        k = (
            rotate((x @ w["attention.wk.weight"].T).view(B, T, G, K))
            .repeat_interleave(H // G, 2)
            .transpose(1, 2)
        )
        v = (x @ w["attention.wv.weight"].T).view(B, T, G, K).repeat_interleave(H // G, 2).transpose(1, 2)
        scores = (q @ k.transpose(2, 3) / K**0.5 + mask_TT).softmax(-1)
        h = h + (scores @ v).transpose(1, 2).reshape(B, T, H * K) @ w["attention.wo.weight"].T
        x = norm(h, w["ffn_norm.weight"])
        x = F.silu(x @ w["feed_forward.w1.weight"].T) * (x @ w["feed_forward.w3.weight"].T)
        h = h + x @ w["feed_forward.w2.weight"].T
    return norm(h, state["norm.weight"]) @ state["output.weight"].T


@torch.no_grad()
def test_logits_equal_metas(tmp_path):
    model = make()
    source = write(tmp_path / "meta", model)
    back = imported(source, tmp_path / "out")
    state = torch.load(source / "consolidated.00.pth", weights_only=True)
    tokens_BT = torch.randint(96, (2, 200), generator=torch.Generator().manual_seed(0))
    theirs = metas_forward(state, CONFIG, tokens_BT)
    assert theirs.std() > 0.5
    assert (back.logits(tokens_BT) - theirs).abs().max() <= 1e-4


@pytest.mark.parametrize(
    "pieces, repeats, stated, embedding_dim",
    [(1, 1, 4, 0), (2, 1, 4, 0), (4, 1, 4, 0), (2, 1, 4, 1), (8, 2, 4, 0), (8, 2, 8, 0), (8, 2, 4, 1)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pieces_are_merged_bit_for_bit(tmp_path, same_bits, pieces, repeats, stated, embedding_dim, dtype):
    model = make().to(dtype)
    params = PARAMS | {"n_kv_heads": stated}
    source = write(
        tmp_path / "meta",
        model,
        pieces,
        repeats=repeats,
        embedding_dim=embedding_dim,
        dtype=dtype,
        params=params,
    )
    back = imported(source, tmp_path / "out")
    same_bits(back, model)
    assert back.config == CONFIG
    lineage = load_lineage(tmp_path / "out")
    assert (lineage.name, lineage.stage) == ("meta", "imported")


def test_copies_of_a_single_kv_head_are_merged(tmp_path, same_bits):
    """Multi-query attention in four pieces stores four copies of one head."""
    model = make(n_kv_heads=1)
    for stated in (1, 4):
        source = write(tmp_path / f"m{stated}", model, 4, repeats=4, params=PARAMS | {"n_kv_heads": stated})
        same_bits(imported(source, tmp_path / f"o{stated}"), model)


def test_tied_models_are_recognized(tmp_path, same_bits):
    model = make(tie_embeddings=True)
    same_bits(imported(write(tmp_path / "a", model, 2), tmp_path / "oa"), model)

    copied = write(
        tmp_path / "b",
        model,
        2,
        change=lambda i, piece: {"output.weight": piece["tok_embeddings.weight"].clone()},
    )
    back = imported(copied, tmp_path / "ob")
    same_bits(back, model)
    assert back.config.tie_embeddings


def test_name_dtype_and_context_can_be_chosen(tmp_path, same_bits):
    model = make()

    table = {"rope.freqs": torch.ones(4)}  # as Llama 1 and 2 had it
    source = write(tmp_path / "meta", model, change=lambda i, piece: table)
    (source / "LICENSE").write_text("terms")
    seen = []
    with pytest.warns(UserWarning, match=r"tokenizer\.model"):
        hash_ = checkpoint.import_meta(
            source,
            tmp_path / "out",
            dtype=torch.bfloat16,
            max_context=4000,
            name="Llama-test",
            progress=lambda done, total: seen.append((done, total)),
        )
    back = checkpoint.load_model(tmp_path / "out")
    same_bits(back, make().to(torch.bfloat16))
    assert back.config.max_context == 4000
    assert checkpoint.checkpoint_hash(tmp_path / "out") == hash_
    assert (tmp_path / "out" / "LICENSE").read_text() == "terms"
    assert load_lineage(tmp_path / "out").name == "Llama-test"
    assert seen[-1] == (CONFIG.n_params * 2, CONFIG.n_params * 2)
    assert sorted(seen) == seen


def test_real_tokenizer_comes_along(tmp_path, real_data):
    model = make(vocab_size=128_256, n_layers=1)
    source = write(tmp_path / "meta", model, params=PARAMS | {"vocab_size": 128_256, "n_layers": 1})
    (source / "tokenizer.model").write_bytes((real_data("llama3_tokenizer") / "tokenizer.model").read_bytes())
    with pytest.warns(UserWarning, match="context"):
        checkpoint.import_meta(source, tmp_path / "out")
    tokenizer = checkpoint.load_tokenizer(tmp_path / "out")
    assert tokenizer.encode("This is a test sentence.", bos=True) == [128000, 2028, 374, 264, 1296, 11914, 13]
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [128001, 128008, 128009]


@pytest.mark.parametrize(
    "dim, multiple_of, multiplier, expected",
    [
        (4096, 1024, 1.3, 14336),  # 8B
        (8192, 4096, 1.3, 28672),  # 70B
        (16384, 4096, 1.2, 53248),  # 405B
        (2048, 256, 1.5, 8192),  # 1B
        (3072, 256, 1.0, 8192),  # 3B
        (4096, 256, None, 11008),  # Llama 2 7B
    ],
)
def test_the_ffn_width_follows_metas_rule(dim, multiple_of, multiplier, expected):
    assert meta.ffn_dim(dim, multiple_of, multiplier) == expected


@pytest.mark.parametrize(
    "size, pieces, stated, change",
    [
        ("8B", 1, 8, {}),
        ("70B", 8, 8, {"dim": 8192, "n_layers": 80, "n_heads": 64, "multiple_of": 4096}),
        ("405B", 8, 8, SHAPE_405B),
        ("405B", 16, 8, SHAPE_405B),
        ("405B", 16, 16, SHAPE_405B),
        ("1B", 1, 8, {"dim": 2048, "n_layers": 16, "ffn_dim_multiplier": 1.5, "multiple_of": 256}),
        (
            "3B",
            1,
            8,
            {"dim": 3072, "n_layers": 28, "n_heads": 24, "ffn_dim_multiplier": 1.0, "multiple_of": 256},
        ),
    ],
)
def test_released_sizes_from_params(tmp_path, size, pieces, stated, change):
    """All five sizes from params.json and the shapes of their pieces; 405B also as MP16, whatever it says of
    G."""
    params = SHAPES_8B | {
        "norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "use_scaled_rope": True,
        "vocab_size": 128256,
    }
    (tmp_path / "params.json").write_text(json.dumps(params | change | {"n_kv_heads": stated}))
    config = SIZES[size]
    rows = max(1, 8 // pieces) * config.head_dim
    parts = []
    for i in range(pieces):
        embedding = torch.zeros(1).expand(128256 // pieces, config.dim)
        parts.append(
            {
                "layers.0.attention.wk.weight": torch.full((1,), i // 2 if pieces == 16 else i).expand(
                    rows, config.dim
                ),
                "tok_embeddings.weight": embedding,
            }
            | ({} if config.tie_embeddings else {"output.weight": torch.zeros(2)})
        )
    assert meta.read_params(tmp_path, parts) == (config, 2 if pieces == 16 else 1)


def test_damaged_and_mixed_releases_are_refused(tmp_path):
    model = make()

    w1, w2 = "layers.1.feed_forward.w1.weight", "layers.1.feed_forward.w2.weight"
    wq, wv = "layers.0.attention.wq.weight", "layers.1.attention.wv.weight"
    embedding = "tok_embeddings.weight"
    damages = (
        (lambda i, piece: {"layers.0.attention.wz.weight": piece.pop(wq)}, wq, "missing"),
        (lambda i, piece: {"vision_model.conv.weight": torch.ones(2)}, "vision_model"),
        (lambda i, piece: {w1: piece[w1].to(torch.int8)}, "torch.int8", "bfloat16 release"),
        (lambda i, piece: {w2: piece[w2][:, 1:].clone()}, w2, "instead of [64, 112]"),
        (lambda i, piece: {"norm.weight": piece["norm.weight"] + i}, "copies of norm.weight differ"),
        (lambda i, piece: {wv: piece[wv] * float("nan")}, wv, "not finite"),
        (lambda i, piece: {embedding: piece[embedding].flatten()}, embedding),
    )
    for number, (change, *named) in enumerate(damages):
        source = write(tmp_path / f"meta{number}", model, 2, change=change)
        refused(source, tmp_path, *named)


def refused(source, tmp_path, *named):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(CheckpointError) as error:
            checkpoint.import_meta(source, tmp_path / "out")
    assert "\n" not in str(error.value)
    for name in named:
        assert name in str(error.value)
    assert not (tmp_path / "out").exists()


def test_repeated_heads_must_be_equal(tmp_path):
    name = "layers.1.attention.wv.weight"
    source = write(
        tmp_path / "meta",
        make(),
        8,
        repeats=2,
        change=lambda i, piece: {name: piece[name] + 1} if i == 5 else {},
    )
    refused(source, tmp_path, f"copies of {name} differ")


@pytest.mark.parametrize(
    "params, named",
    [
        ({"dim": 128}, "params.json"),
        ({"dim": None}, "dim=None"),
        ({"n_heads": "8"}, "n_heads='8'"),
        ({"n_heads": 7}, "do not divide"),
        ({"n_kv_heads": 2}, "n_kv_heads=2"),
        ({"n_layers": 3}, "layers.2."),
        ({"n_layers": 1}, "unexpected tensor layers.1."),
        ({"multiple_of": 64}, "instead of [256, 64]"),
        ({"multiple_of": "x"}, "params.json"),
        ({"multiple_of": 0}, "params.json"),
        ({"vocab_size": 97}, "vocab_size=97"),
        ({"rope_theta": 0.0}, "rope_theta=0.0"),
        ({"lora_args": {"rank": 16}}, "lora_args"),
        ({"quantization_args": {"group_size": 32}}, "quantization_args"),
    ],
)
def test_params_that_do_not_fit_the_pieces_are_refused(tmp_path, params, named):
    refused(write(tmp_path / "meta", make(), params=PARAMS | params), tmp_path, named)


def test_damaged_and_hostile_files_are_refused(tmp_path):
    source = write(tmp_path / "meta", make(), 2)
    second = source / "consolidated.01.pth"
    data = second.read_bytes()
    for point in (0, 1, 100, len(data) // 2, len(data) - 1):
        second.write_bytes(data[:point])
        refused(source, tmp_path, "consolidated.01.pth", "damaged")
    for content in ({"x": Bomb()}, Bomb()):
        torch.save(content, second)
        refused(source, tmp_path, "consolidated.01.pth", "could run code")
    torch.save([torch.ones(2)], second)
    refused(source, tmp_path, "not a dict of tensors")
    torch.save({"a": 1}, second)
    refused(source, tmp_path, "not a dict of tensors")
    second.rename(source / "consolidated.02.pth")
    refused(source, tmp_path, "consolidated.01.pth is missing")
    (source / "params.json").unlink()
    (source / "consolidated.02.pth").unlink()
    refused(source, tmp_path, "params.json", "no such file")
    refused(tmp_path / "nowhere", tmp_path, "no such folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", tmp_path, "no consolidated")


def test_permutation_is_undone_by_its_inverse():
    weight, Q = torch.arange(24 * 5).view(24, 5), "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(names.from_pairs(Q, names.to_pairs(Q, weight, 8), 8), weight)
    assert torch.equal(names.to_pairs(Q, names.from_pairs(Q, weight, 8), 8), weight)
    assert names.from_pairs(Q, torch.arange(6)[:, None], 6).flatten().tolist() == [0, 2, 4, 1, 3, 5]


def test_import_takes_a_context_for_metas_files_only(tmp_path, capsys):
    model = make(rope_scaling=None)
    source = write(tmp_path / "meta", model, params=PARAMS | {"use_scaled_rope": False})
    assert cli.run(["import", str(source), str(tmp_path / "a"), "--max-context", "777"]) == 0
    assert checkpoint.load_config(tmp_path / "a").max_context == 777
    assert cli.run(["import", str(tmp_path / "a"), str(tmp_path / "b"), "--max-context", "777"]) == 1
    assert "--max-context is for Meta's files" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_export_to_a_name_that_ends_in_gguf_writes_a_gguf_file(tmp_path):
    checkpoint.save_model(tmp_path / "a", make())
    assert cli.run(["export", str(tmp_path / "a"), str(tmp_path / "out.gguf")]) == 0
    assert (tmp_path / "out.gguf").read_bytes()[:4] == b"GGUF"
