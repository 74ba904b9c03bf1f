"""Checkpoints with a ChatML, an R1-like or a SentencePiece tokenizer keep it, with its template and stop tokens."""

import json

import pytest
from tokenizers import AddedToken, decoders, models, trainers
from tokenizers import Tokenizer as Library
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer

import herd
from herd import checkpoint
from herd.checkpoint.gguf import GGUF, Strings
from herd.checkpoint.gguf_tokenizer import read_tokenizer, tokenizer_metadata
from herd.cli import run
from herd.engine import Constraint, Engine, Request, Sampling
from herd.errors import TokenizerError
from herd.quant.formats import Q8_0, scheme
from herd.text import Tokenizer, render
from herd.text.library_tokenizer import LibraryTokenizer
from herd.text.pretokenizers import PRE_TOKENIZERS
from herd.text.ranks_tokenizer import SPECIAL_TOKENS, RanksTokenizer
from herd.text.vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN, Vocabulary

TEXTS = [
    "",
    " ",
    "Hello, world! 12345",
    "  two  spaces\n\n\ttab ",
    "naïve café – 日本語 🦙",
    "x = {'a': [1]}\r\n",
]
WORDS = (
    "the quick brown fox jumps over the lazy dog and the quick cat sleeps in the warm sun all day long"
).split()
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}"
    "{% else %}{{ '<｜Assistant｜>' + m['content'].split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}"
)
DIALOG = [
    {"role": "user", "content": "the quick </s> brown <|im_end|> fox"},
    {"role": "assistant", "content": "jumps"},
    {"role": "user", "content": "over"},
]


def sentencepiece() -> Tokenizer:
    pieces = sorted({word[:n] for word in ["▁" + w for w in WORDS] for n in range(2, len(word) + 1)})
    letters = sorted(set("▁abcdefghijklmnopqrstuvwxyzABCDEFGH,.!?0123456789{}'[]=:\""))
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, *pieces]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * (len(letters) + len(pieces))]
    scores = [0.0] * 259 + [-1000.0] * len(letters) + [-float(n) for n in range(len(pieces))]
    vocabulary = Vocabulary(tokens, types, scores=scores)
    library = vocabulary.build()
    made = LibraryTokenizer(library, bos="<s>", eos="</s>", unk="<unk>", add_bos=True, vocabulary=vocabulary)
    return made.with_settings(chat_template=INST)


def chatml() -> Tokenizer:
    library = Library(models.BPE())
    library.pre_tokenizer = PRE_TOKENIZERS["smollm"].cutter()
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=ByteLevel.alphabet(), show_progress=False,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    )  # fmt: skip
    library.train_from_iterator([" ".join(WORDS)], trainer)
    library.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in ("<|im_end|>",)])
    made = LibraryTokenizer(library, bos="<|im_start|>", eos="<|endoftext|>", pad="<|im_end|>")
    return made.with_settings(chat_template=CHATML)


def r1() -> Tokenizer:
    ranks = RanksTokenizer.train([" ".join(WORDS) * 3], 540).ranks
    names = list(SPECIAL_TOKENS)
    names[0], names[1], names[11], names[12] = (
        "<｜begin▁of▁sentence｜> <｜end▁of▁sentence｜> <｜User｜> <｜Assistant｜>".split()
    )
    return RanksTokenizer(ranks, {name: len(ranks) + i for i, name in enumerate(names)}).with_settings(
        chat_template=R1
    )


@pytest.fixture(scope="module", params=[sentencepiece, chatml, r1], ids=lambda make: make.__name__)
def original(request) -> Tokenizer:
    return request.param()


@pytest.fixture
def folder(original, make_model, tmp_path):
    model = make_model(
        vocab_size=original.vocab_size, dim=64, n_heads=2, n_kv_heads=2, ffn_dim=64, head_dim=32
    )
    checkpoint.save_model(tmp_path / "model", model, original)
    return tmp_path / "model"


def same(found: Tokenizer, original: Tokenizer) -> None:
    for text in TEXTS:
        assert found.encode(text, bos=True) == original.encode(text, bos=True), repr(text)
        assert found.decode(found.encode(text)) == text
    assert found.chat_template == original.chat_template
    assert found.stop_ids == original.stop_ids
    assert (
        render(DIALOG, found, generation_prompt=True).ids
        == render(DIALOG, original, generation_prompt=True).ids
    )


def test_a_saved_folder_loads_in_transformers_without_code_and_gives_the_same_ids(folder, original):
    oracle = AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        assert oracle(text)["input_ids"] == original.encode(text, bos=True), repr(text)
        assert oracle.decode(original.encode(text)) == text
    same(checkpoint.load_tokenizer(folder), original)
    plain = [DIALOG[2], DIALOG[1]]
    expected = oracle.apply_chat_template(plain, return_dict=False)
    assert render(plain, original).ids == expected


def test_a_gguf_file_and_what_is_made_of_it_have_the_tokenizer_of_the_folder(folder, original, tmp_path):
    checkpoint.export_gguf(folder, tmp_path / "m.gguf")
    same(read_tokenizer(GGUF(tmp_path / "m.gguf")), original)
    same(herd.Tokenizer.from_file(tmp_path / "m.gguf"), original)
    checkpoint.import_gguf(tmp_path / "m.gguf", tmp_path / "imported")
    same(checkpoint.load_tokenizer(tmp_path / "imported"), original)
    checkpoint.quantize_folder(checkpoint.ImportSource(folder), tmp_path / "quantized", scheme(Q8_0))
    same(checkpoint.load_tokenizer(tmp_path / "quantized"), original)
    checkpoint.export_hf(tmp_path / "quantized", tmp_path / "unpacked")
    same(checkpoint.load_tokenizer(tmp_path / "unpacked"), original)
    checkpoint.export_vllm(tmp_path / "quantized", tmp_path / "vllm")
    same(Tokenizer.from_folder(tmp_path / "vllm"), original)


def test_a_model_answers_and_is_trained_on_dialogs_in_its_own_format(folder, tmp_path, capsys):
    assert run(["chat", str(folder), "-p", "the quick", "--max-tokens", "4"]) == 0
    lines = [
        json.dumps({"messages": [DIALOG[2], {"role": "assistant", "content": " ".join(WORDS[n:])}]})
        for n in range(8)
    ]
    (tmp_path / "d.jsonl").write_text("\n".join(lines))
    recipe = tmp_path / "sft.yaml"
    recipe.write_text(
        f"name: sft\nout: {tmp_path / 'out'}\nmodel: {{start: {folder}}}\n"
        f"data: {{kind: dialogs, path: {tmp_path / 'd.jsonl'}}}\nobjective: {{kind: sft}}\n"
        "optimizer: {kind: adamw, lr: 1e-3}\ntrain: {context: 256, steps: 1, batch_size: 1}\n"
    )
    assert run(["train", str(recipe)]) == 0, capsys.readouterr().err
    same(checkpoint.load_tokenizer(tmp_path / "out" / "model"), checkpoint.load_tokenizer(folder))


def test_an_answer_follows_a_schema_in_every_vocabulary(folder):
    model, tokenizer = herd.load(folder)
    schema = {
        "type": "object",
        "properties": {"a": {"enum": ["the fox", "é"]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    constraint = Constraint.json_schema(json.dumps(schema))
    for seed in range(3):
        wish = Sampling(max_tokens=200, temperature=1.0, seed=seed)
        done = Engine(model, tokenizer).run(
            [Request(tokenizer.encode("x", bos=True), wish, constraint=constraint)]
        )[0]
        assert json.loads(done.text)["a"] in ("the fox", "é")


def test_the_reasoning_that_a_prompt_opens_is_kept_out_of_the_answer():
    chat = r1().require_chat()
    parsed = chat.parser().parse("the sum is 48\n</think>\n\n48")
    assert (parsed.reasoning, parsed.content) == ("the sum is 48", "48")


@pytest.mark.parametrize("pre", [None, "no-such"])
def test_a_file_that_names_no_known_pre_tokenizer_is_read_with_the_name_given(tmp_path, make_model, pre):
    original = chatml()
    metadata = {key: value for key, _, value in tokenizer_metadata(original, original.vocab_size)}
    metadata["tokenizer.ggml.pre"] = pre

    class File:
        path = tmp_path / "m.gguf"

        def get(self, key, kind, default=None):
            value = metadata.get(key)
            if value is None:
                return default
            return tuple(value) if kind is tuple else value

        def require(self, key, kind):
            value = metadata[key]
            return Strings([v.encode() for v in value]) if kind is Strings else tuple(value)

    same(read_tokenizer(File(), pre="smollm"), original)
    if pre is None:
        with pytest.warns(UserWarning, match="does not name its pre-tokenizer; using 'default'"):
            read_tokenizer(File())
    else:
        with pytest.raises(TokenizerError, match="'no-such', which is not known"):
            read_tokenizer(File())
