"""What was imported is exported with its own tokenizer, template, stop tokens, sampling and licence.

Each checkpoint (ChatML, an R1-Distill-like one, SentencePiece, SmolLM2) becomes a Hugging Face folder, a GGUF
file, a quantized folder and a vLLM folder. transformers loads them without code of their own. llama.cpp does in
the soak run.
"""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from llamacpp import ask_llama_cpp
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Library
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import herd
from herd import checkpoint
from herd.checkpoint.gguf import GGUF
from herd.checkpoint.gguf_tokenizer import read_tokenizer
from herd.engine import Engine, Request, Sampling
from herd.llama.config import ModelConfig
from herd.llama.model import LlamaLM
from herd.quant import scheme
from herd.text.pretokenizers import PRE_TOKENIZERS

TEXTS = [
    "Hello, world!",
    "two  spaces\n\n\ttab and 12345 digits",
    "naïve café – 日本語 🦙",
    "<|im_end|> and </s> and <｜end▁of▁sentence｜> are text here",
    "def f(x):\n    return {'a': [1, 2.5e-3]}\r\n",
]
# transformers drops a space that SentencePiece and llama.cpp keep, where a text begins with spaces
ALL_TEXTS = [*TEXTS, "  it begins with spaces"]
CORPUS = [f"{text} number {n} and more words to join" for n in range(60) for text in TEXTS[:3] + TEXTS[4:]]
DIALOG = [
    {"role": "user", "content": "What is 6 times 7?"},
    {"role": "assistant", "content": "42"},
    {"role": "user", "content": "And 6 times 8? <|im_end|>"},
]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}{% else %}"
    "{{ '<｜Assistant｜>' + m.content.split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
SAMPLING = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05}


def byte_level(pre: str, special: list[str], plain: list[str] = ()) -> Library:  # type: ignore[assignment]
    library = Library(models.BPE(ignore_merges=PRE_TOKENIZERS[pre].ignore_merges))
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PRE_TOKENIZERS[pre].patterns]
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=450, initial_alphabet=alphabet, show_progress=False)
    library.train_from_iterator(CORPUS, trainer)
    library.add_special_tokens([AddedToken(name, normalized=False) for name in special])
    library.add_tokens([AddedToken(name, normalized=False) for name in plain])
    return library


def write_chatml(folder: Path) -> None:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    library = byte_level("qwen2", special)
    library.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "chat_template": CHATML,
    }
    write_settings(folder, settings | {"pad_token": "<|endoftext|>", "model_max_length": 512})
    ids = [library.token_to_id(name) for name in ("<|im_end|>", "<|endoftext|>")]
    write_json(folder / "generation_config.json", SAMPLING | {"eos_token_id": ids, "pad_token_id": ids[1]})


def write_r1(folder: Path) -> None:
    bos, eos = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
    library = byte_level("llama-bpe", [bos, eos, "<｜User｜>", "<｜Assistant｜>"], ["<think>", "</think>"])
    library.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, library.token_to_id(bos))]
    )
    library.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eos}
    write_settings(folder, settings | {"pad_token": eos, "chat_template": R1, "model_max_length": 512})
    ids = {"bos_token_id": library.token_to_id(bos), "eos_token_id": library.token_to_id(eos)}
    write_json(folder / "generation_config.json", SAMPLING | ids)


def write_sentencepiece(folder: Path) -> None:
    spm = pytest.importorskip("sentencepiece")
    written = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=written, vocab_size=420, model_type="bpe",
        byte_fallback=True, character_coverage=0.98, remove_extra_whitespaces=False,
        normalization_rule_name="identity", minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(written.getvalue())
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    write_settings(
        folder, settings | {"add_bos_token": True, "add_eos_token": False, "chat_template": LLAMA2}
    )
    write_json(folder / "generation_config.json", SAMPLING | {"bos_token_id": 1, "eos_token_id": 2})


def write_settings(folder: Path, settings: dict) -> None:
    write_json(folder / "tokenizer_config.json", {"clean_up_tokenization_spaces": False} | settings)


def write_json(path: Path, data: dict) -> None:
    path.write_text(json.dumps(data), encoding="utf-8")


KINDS = {"chatml": write_chatml, "r1": write_r1, "sentencepiece": write_sentencepiece}


@pytest.fixture(scope="module", params=KINDS)
def released(request, tmp_path_factory) -> Path:
    """A folder as its makers would release it: random weights, own tokenizer, sampling, licence."""
    folder = tmp_path_factory.mktemp(request.param) / "released"
    config = ModelConfig(512, 64, 2, 4, 2, 96, head_dim=16, rope_theta=10_000.0, max_context=512)
    checkpoint.save_model(folder, LlamaLM(config).init_weights(0, std=0.2))
    (folder / "LICENSE").write_text("Terms of the makers.\n")
    KINDS[request.param](folder)
    return folder


@pytest.fixture(scope="module")
def imported(released) -> Path:
    folder = released.parent / "imported"
    checkpoint.import_hf(released, folder)
    return folder


@pytest.fixture(scope="module")
def exported(imported) -> dict[str, Path]:
    """The imported folder in all layouts, directly and by way of a quantized folder."""
    out = imported.parent
    checkpoint.export_hf(imported, out / "hf")
    checkpoint.export_gguf(imported, out / "plain.gguf", "f32")
    checkpoint.export_vllm(imported, out / "vllm")
    checkpoint.quantize_folder(checkpoint.ImportSource(imported), out / "q8", scheme("q8"))
    checkpoint.export_hf(out / "q8", out / "q8-hf", dtype=torch.float32)
    checkpoint.export_gguf(out / "q8", out / "q8.gguf")
    checkpoint.export_vllm(out / "q8", out / "q8-vllm")
    checkpoint.import_gguf(out / "plain.gguf", out / "from-gguf")
    names = ("hf", "plain.gguf", "vllm", "q8", "q8-hf", "q8.gguf", "q8-vllm", "from-gguf")
    return {name: out / name for name in names}


def tokenizer_of(folder: Path) -> herd.Tokenizer:
    """Read a folder's tokenizer. Of a vLLM folder Herd reads nothing else."""
    return (
        checkpoint.load_tokenizer(folder) if "vllm" not in folder.name else herd.Tokenizer.from_folder(folder)
    )


def greedy(model: LlamaLM, prompt: list[int], n: int = 24) -> list[int]:
    """Return Herd's greedy tokens. Stop tokens do not end them."""
    return Engine(model, None).run([Request(prompt, Sampling(max_tokens=n, temperature=0))])[0].ids


def same_tokenizer(ours: herd.Tokenizer, theirs, dialogs: bool = True) -> None:
    """Ids, dialogs and stop tokens are those of transformers' tokenizer, whose own ones are in the text."""
    for text in TEXTS:
        if "<|im_end|>" not in text:  # transformers reads special tokens out of texts
            assert ours.encode(text, bos=ours.add_bos) == theirs(text).input_ids, text
    rendered = theirs.apply_chat_template(DIALOG[:1], add_generation_prompt=True, return_dict=False)
    if dialogs:
        assert herd.render(DIALOG[:1], ours, generation_prompt=True).ids == rendered
    assert theirs.eos_token_id in ours.stop_ids


@pytest.mark.parametrize("layout", ["hf", "vllm", "q8-hf", "q8-vllm", "from-gguf"])
def test_transformers_reads_the_same_tokenizer_from_every_folder(released, exported, layout):
    before, after = AutoTokenizer.from_pretrained(released), AutoTokenizer.from_pretrained(exported[layout])
    # After a special token SentencePiece and llama.cpp begin with a space, as Herd does and transformers with
    # The tokenizer.json that Herd writes. transformers' own class for Llama's tokenizer.model does not.
    exact = not (released / "tokenizer.model").exists()
    for text in TEXTS if exact else TEXTS[:3] + TEXTS[4:]:
        assert after(text).input_ids == before(text).input_ids, text
        assert after.decode(after(text).input_ids) == before.decode(before(text).input_ids)
    for dialog in (DIALOG[:1], DIALOG) if exact else ():
        for prompt in (False, True):
            asked = {"add_generation_prompt": prompt, "return_dict": False}
            assert after.apply_chat_template(dialog, **asked) == before.apply_chat_template(dialog, **asked)
    assert (after.eos_token, after.bos_token) == (before.eos_token, before.bos_token)
    same_tokenizer(tokenizer_of(exported[layout]), after, dialogs=exact or layout in ("q8-hf", "from-gguf"))


@pytest.mark.parametrize("layout", ["hf", "q8-hf", "from-gguf"])
@torch.no_grad()
def test_transformers_computes_the_same_tokens(exported, layout):
    model = checkpoint.load_model(exported[layout], dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(exported[layout], dtype=torch.float32)
    theirs.generation_config = GenerationConfig(max_new_tokens=24)  # greedy, and no stop tokens
    prompt = checkpoint.load_tokenizer(exported[layout]).encode(TEXTS[0], bos=True)
    tokens_1T = torch.tensor([prompt])
    assert (theirs(tokens_1T).logits - model.logits(tokens_1T)).abs().max() <= 1e-4
    wanted = theirs.generate(tokens_1T, attention_mask=torch.ones_like(tokens_1T))
    assert greedy(model, prompt) == wanted[0, len(prompt) :].tolist()


@pytest.mark.parametrize("layout", ["hf", "vllm", "q8", "q8-hf", "q8-vllm"])
def test_sampling_and_licence_are_carried_byte_for_byte(released, exported, layout):
    for name in ("LICENSE", "generation_config.json"):
        assert (exported[layout] / name).read_bytes() == (released / name).read_bytes(), name


@pytest.mark.parametrize("layout", ["hf", "vllm", "q8", "q8-hf", "q8-vllm", "from-gguf"])
def test_stop_tokens_template_and_special_tokens_are_the_originals(released, exported, layout):
    before, after = tokenizer_of(released), tokenizer_of(exported[layout])
    assert after.stop_ids == before.stop_ids
    assert after.chat_template == before.chat_template
    assert after.special_tokens == before.special_tokens
    assert after.sha256 == before.sha256
    assert (after.bos_id, after.eos_id, after.add_bos) == (before.bos_id, before.eos_id, before.add_bos)
    for text in ALL_TEXTS:  # also where a text spells special tokens
        assert after.encode(text) == before.encode(text)
    for dialog in (DIALOG[:1], DIALOG):
        rendered = [herd.render(dialog, t, generation_prompt=True).ids for t in (before, after)]
        assert rendered[0] == rendered[1]


@pytest.mark.parametrize("name", ["plain.gguf", "q8.gguf"])
def test_a_gguf_has_the_whole_tokenizer(released, exported, name):
    before, after = checkpoint.load_tokenizer(released), read_tokenizer(GGUF(exported[name]))
    assert [after.encode(text) for text in ALL_TEXTS] == [before.encode(text) for text in ALL_TEXTS]
    assert (after.stop_ids, after.chat_template) == (before.stop_ids, before.chat_template)


def check_in_llama_cpp(file: Path, tokenizer: herd.Tokenizer, tmp_path: Path) -> None:
    """llama.cpp loads the file, has the same ids for the texts, and the same greedy tokens."""
    model = checkpoint.load_model(file)
    prompt = tokenizer.encode(TEXTS[0], bos=True)
    ids, run = ask_llama_cpp(
        [
            {"do": "tokenize", "file": str(file), "texts": ALL_TEXTS},
            {"do": "run", "file": str(file), "prompt": prompt, "n": 24, "out": str(tmp_path / "x.npy")},
        ]
    )
    for text, theirs in zip(ALL_TEXTS, ids["ids"], strict=True):
        assert tokenizer.encode(text, bos=tokenizer.add_bos) == theirs, text
    with torch.no_grad():
        ours = model.logits(torch.tensor([prompt]))[0].numpy()
    assert np.abs(np.load(tmp_path / "x.npy") - ours).max() <= 1e-3
    assert greedy(model, prompt) == run["ids"]


@pytest.mark.soak
def test_llama_cpp_runs_the_exported_gguf(released, exported, tmp_path):
    check_in_llama_cpp(exported["plain.gguf"], checkpoint.load_tokenizer(released), tmp_path)


@pytest.fixture(scope="module")
def smollm2(real_data, tmp_path_factory):
    """SmolLM2 unpacked to bf16, as a folder."""
    source = next(real_data("smollm2").glob("*.gguf"))
    folder = tmp_path_factory.mktemp("smollm2") / "folder"
    checkpoint.import_gguf(source, folder, dtype=torch.bfloat16)
    return source, folder


@pytest.mark.soak
@torch.no_grad()
def test_smollm2_is_the_same_model_in_transformers_and_llama_cpp(smollm2, tmp_path):
    source, folder = smollm2
    ours, theirs = checkpoint.load_tokenizer(source), AutoTokenizer.from_pretrained(folder)
    same_tokenizer(ours, theirs, dialogs=False)
    asked = {"add_generation_prompt": True, "return_dict": False}
    rendered = herd.render(DIALOG[:1], ours, generation_prompt=True).ids
    assert rendered == theirs.apply_chat_template(DIALOG[:1], **asked)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    loaded = checkpoint.load_model(folder, dtype=torch.float32)
    prompt = torch.tensor([rendered])
    assert (model(prompt).logits - loaded.logits(prompt)).abs().max() <= 1e-3
    checkpoint.export_gguf(folder, tmp_path / "smollm2.gguf", "f32")
    check_in_llama_cpp(tmp_path / "smollm2.gguf", ours, tmp_path)
    assert checkpoint.load_lineage(folder).licence == "apache-2.0"
