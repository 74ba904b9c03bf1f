"""A folder written here loads in transformers with no code, and what transformers writes loads here: the same
bits."""

import warnings

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, LlamaForCausalLM

import herd.checkpoint as checkpoint
from herd.checkpoint.lineage import Lineage, load_lineage
from herd.engine import Engine, Request, Sampling
from herd.errors import CheckpointError, TokenizerError
from herd.text.tokenizer import Tokenizer

PROMPT = [3, 141, 59, 265]


def greedy_here(model, n=40):
    return Engine(model, None).run([Request(PROMPT, Sampling(max_tokens=n))])[0].ids


def greedy_there(model, n=40):
    prompt = torch.tensor([PROMPT])
    settings = GenerationConfig(max_new_tokens=n, min_new_tokens=n, do_sample=False, pad_token_id=0)
    model.generation_config = settings  # else the folder's stop tokens are filled in
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=settings)
    return out[0, len(PROMPT) :].tolist()


def bits(tensor):
    return tensor.detach().contiguous().view(torch.uint8)


@pytest.mark.parametrize("shard", [10**9, 60_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tie", [False, True])
def test_round_trip_through_transformers(tmp_path, make_model, tokenizer, same_bits, tie, dtype, shard):
    model = make_model(dtype=dtype, tie_embeddings=tie)
    checkpoint.save_model(tmp_path / "ours", model, tokenizer, max_shard_bytes=shard)
    assert (len(list((tmp_path / "ours").glob("*.safetensors"))) > 1) == (shard == 60_000)
    same_bits(checkpoint.load_model(tmp_path / "ours"), model)

    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto").eval()
    assert theirs.dtype == dtype
    state = theirs.state_dict()
    for name, param in model.named_parameters():
        assert torch.equal(bits(state[name]), bits(param)), name
    if dtype == torch.float32:
        assert greedy_here(model) == greedy_there(theirs)
    else:  # rounded sums depend on the order of adding, but the same weights in fp32 must agree
        assert greedy_here(checkpoint.load_model(tmp_path / "ours", dtype=torch.float32)) == greedy_there(
            theirs.float()
        )
        theirs = theirs.to(dtype)

    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=shard)
    back = checkpoint.load_model(tmp_path / "theirs")
    same_bits(back, model)
    assert back.config == model.config
    assert greedy_here(back) == greedy_here(model)
    assert checkpoint.checkpoint_hash(tmp_path / "theirs") == checkpoint.checkpoint_hash(tmp_path / "ours")


def test_tokenizer_and_generation_files_are_read_by_transformers(tmp_path, make_model, tokenizer):
    checkpoint.save_model(tmp_path / "x", make_model(), tokenizer)
    assert checkpoint.load_tokenizer(tmp_path / "x") == tokenizer
    text = "The quick dog <|eot_id|> don't 12345\n\n  end"
    theirs = AutoTokenizer.from_pretrained(tmp_path / "x")
    assert theirs("again and again", add_special_tokens=False).input_ids == tokenizer.encode(
        "again and again"
    )
    assert theirs.bos_token_id == tokenizer.bos_id
    generation = GenerationConfig.from_pretrained(tmp_path / "x")
    assert set(generation.eos_token_id) == tokenizer.stop_ids
    assert AutoConfig.from_pretrained(tmp_path / "x").eos_token_id == sorted(tokenizer.stop_ids)
    assert checkpoint.load_tokenizer(tmp_path / "x").decode(tokenizer.encode(text)) == text


def test_no_tokenizer_is_announced(tmp_path, make_model):
    checkpoint.save_model(tmp_path / "x", make_model())
    with pytest.warns(UserWarning, match="no tokenizer"):
        assert checkpoint.load_tokenizer(tmp_path / "x") is None
    assert not (tmp_path / "x" / "generation_config.json").exists()
    assert LlamaForCausalLM.from_pretrained(tmp_path / "x").config.eos_token_id is None


def test_a_tokenizer_too_big_for_the_model_is_refused(tmp_path, make_model, tokenizer):
    with pytest.raises(TokenizerError, match="532 ids"):
        checkpoint.save_model(tmp_path / "x", make_model(vocab_size=531), tokenizer)
    assert not list(tmp_path.iterdir())
    checkpoint.save_model(tmp_path / "x", make_model(vocab_size=531))
    tokenizer.save(tmp_path / "x")
    with pytest.raises(TokenizerError, match="do not belong together"):
        checkpoint.load_tokenizer(tmp_path / "x")


def test_the_hash_depends_on_bits_and_not_on_files(tmp_path, make_model):
    model = make_model()
    first = checkpoint.save_model(tmp_path / "a", model)
    assert (
        first
        == checkpoint.save_model(tmp_path / "b", model, max_shard_bytes=1)
        == checkpoint.checkpoint_hash(tmp_path / "b")
    )
    assert first != checkpoint.save_model(tmp_path / "b", model, dtype=torch.bfloat16)
    with torch.no_grad():
        model.model.norm.weight[3] *= -1
    assert first != checkpoint.save_model(tmp_path / "b", model)


def test_the_lineage_is_saved_and_changed(tmp_path, make_model):
    lineage = Lineage(
        name="student",
        stage="distil",
        parents={"teacher": "ab" * 32},
        recipe={"steps": 5},
        evals={"bpb": 1.25},
    )
    hash_ = checkpoint.save_model(tmp_path / "x", make_model(), lineage=lineage)
    found = load_lineage(tmp_path / "x")
    assert found == lineage.model_copy(update={"weights_hash": hash_})
    assert found.created_by.startswith("herd ")
    checkpoint.save_model(tmp_path / "x", make_model())
    assert load_lineage(tmp_path / "x") is None


@pytest.mark.parametrize(
    "text, named",
    [
        ('{"format": 2, "name": "x", "stage": "y"}', "format 2"),
        ('{"name": "x", "stage": "y"}', "format None"),
        ('{"format": 1, "stage": "y"}', "name"),
        ('{"format": 1, "name": "x", "stage": "y", "colour": 3}', "colour"),
        ("[]", "format None"),
        ("{", "not readable JSON"),
    ],
)
def test_a_malformed_lineage_is_refused(tmp_path, text, named):
    (tmp_path / "herd.json").write_text(text)
    with pytest.raises(CheckpointError, match=named) as error:
        load_lineage(tmp_path)
    assert "\n" not in str(error.value)


def test_dtypes_are_kept_or_converted(tmp_path, make_model):
    model = make_model()
    checkpoint.save_model(tmp_path / "x", model)
    loaded = checkpoint.load_model(tmp_path / "x", dtype=torch.bfloat16)
    for name, param in loaded.named_parameters():
        assert torch.equal(param, dict(model.named_parameters())[name].bfloat16())
    checkpoint.save_model(tmp_path / "h", model, dtype=torch.float16)
    assert checkpoint.load_model(tmp_path / "h").lm_head.weight.dtype == torch.float16
    with pytest.raises(CheckpointError, match="cannot be stored"):
        checkpoint.save_model(tmp_path / "y", model.double())


def test_values_that_float16_cannot_hold_are_refused(tmp_path, make_model):
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight[5, 5] = 1e6
    with pytest.raises(CheckpointError, match=r"lm_head.weight has values beyond the range of torch.float16"):
        checkpoint.save_model(tmp_path / "x", model, dtype=torch.float16)
    assert not list(tmp_path.iterdir())
    checkpoint.save_model(tmp_path / "x", model)
    with pytest.raises(CheckpointError, match="beyond the range"):
        checkpoint.load_model(tmp_path / "x", dtype=torch.float16)


def test_loaded_model_trains_and_owns_its_memory(tmp_path, make_model, same_bits):
    model = make_model(tie_embeddings=True)
    checkpoint.save_model(tmp_path / "x", model)
    loaded = checkpoint.load_model(tmp_path / "x")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    file = tmp_path / "x" / "model.safetensors"
    file.write_bytes(b"\xff" * file.stat().st_size)
    same_bits(loaded, model)
    tokens = torch.randint(600, (2, 9))
    loaded.logits(tokens).sum().backward()
    assert all(param.grad is not None for param in loaded.parameters())


def test_extra_tensors_of_old_programs_are_ignored(tmp_path, make_model, same_bits):
    from safetensors.torch import load_file, save_file

    model = make_model(tie_embeddings=True)
    checkpoint.save_model(tmp_path / "x", model)
    file = tmp_path / "x" / "model.safetensors"
    state = load_file(file)
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, file)
    same_bits(checkpoint.load_model(tmp_path / "x"), model)
    state["lm_head.weight"][0, 0] += 1
    save_file(state, file)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is not the embedding"):
        checkpoint.load_model(tmp_path / "x")


def test_several_dtypes_are_announced(tmp_path, make_model):
    from safetensors.torch import load_file, save_file

    checkpoint.save_model(tmp_path / "x", make_model(dtype=torch.bfloat16))
    file = tmp_path / "x" / "model.safetensors"
    state = load_file(file)
    name = "model.layers.0.mlp.up_proj.weight"
    state[name] = state[name].float()
    save_file(state, file)
    with pytest.warns(UserWarning, match="several dtypes; using fp32"):
        assert checkpoint.load_model(tmp_path / "x").dtype == torch.float32
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checkpoint.load_model(tmp_path / "x", dtype=torch.float32)


def test_a_missing_folder_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    for source, reason in (("nothing", "no such file or folder"), ("file", "truncated or not GGUF")):
        with pytest.raises(CheckpointError, match=reason):
            checkpoint.load_model(tmp_path / source)


def test_herd_load_returns_model_and_tokenizer(tmp_path, make_model, tokenizer, same_bits):
    import herd

    model = make_model()
    checkpoint.save_model(tmp_path / "x", model, tokenizer)
    loaded, its_tokenizer = herd.load(tmp_path / "x")
    same_bits(loaded, model)
    assert its_tokenizer == tokenizer
    assert isinstance(its_tokenizer, Tokenizer)
