"""The ids of a context and its continuation are those of lm-eval's `hf` model, whatever the tokenizer."""

import pytest

pytest.importorskip("lm_eval", reason="needs lm-eval: pip install lm-eval")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoTokenizer

from herd.evals.local import CheckpointModel
from herd.text.library_tokenizer import LibraryTokenizer
from herd.text.tokenizer import Tokenizer
from herd.text.vocabulary import BYTE, CONTROL, NORMAL, SPACE, UNKNOWN, Vocabulary

PAIRS = [
    ("Question: is it so?\nAnswer:", " no"),
    ("Question: is it so?\nAnswer: ", "no"),
    ("Question: is it so?\nAnswer:  \n ", " no"),
    ("The fox", " jumps over 12345 dogs."),
    ("The fox jum", "ps over"),
    ("one\n\ntwo\n\n", "three\n\nfour"),
    ("one\n\n\n  two", "\n\n  three"),
    ("def area(x):\n", "    return x"),
    ("Straße", " naïve 数式 🦙"),
    ("", "The fox"),
    ("", " jumps"),
]


class Pairs(HFLM):
    """lm-eval's model up to where it would compute: it keeps the ids."""

    def __init__(self, tokenizer) -> None:
        self.tokenizer, self.backend = tokenizer, "causal"
        self.add_bos_token = self.custom_prefix_token_id = None
        self.enable_thinking = False

    def _loglikelihood_tokens(self, requests, **_):
        return [(list(context), list(continuation)) for _, context, continuation in requests]


def byte_level(pre: str, add_bos: bool) -> LibraryTokenizer:
    """A vocabulary of the bytes and some merges."""
    from herd.text.ranks import spell

    tokens = ["<unk>", "<s>", "</s>", *(spell(bytes([byte])) for byte in range(256))]
    types = [UNKNOWN, CONTROL, CONTROL, *[NORMAL] * 256]
    merges = []
    for left, right in (
        (b"T", b"h"), (b"Th", b"e"), (b" ", b"n"), (b" n", b"o"), (b"\n", b"\n"), (b" ", b" "), (b"  ", b"  "),
        (b"p", b"s"), (b"m", b"ps"), (b"1", b"2"), (b"12", b"3"), (b" ", b"j"), (b":", b" "),
    ):  # fmt: skip
        merges.append(f"{spell(left)} {spell(right)}")
        tokens.append(spell(left + right))
        types.append(NORMAL)
    library = Vocabulary(tokens, types, merges=merges, pre=pre).build()
    return LibraryTokenizer(library, bos="<s>", eos="</s>", unk="<unk>", add_bos=add_bos)


def sentencepiece() -> LibraryTokenizer:
    """A vocabulary with scores, spaces before words and byte tokens, as Llama 2's."""
    longer = (f"{SPACE}n", f"{SPACE}no", "Th", "The", f"{SPACE}The", "jum", "ps")
    words = [SPACE, *"abcdefghijklmnopqrstuvwxyzTQA:?.", *longer]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(words)]
    scores = [0.0] * 259 + [-float(n) for n in range(len(words))]
    library = Vocabulary(tokens, types, scores=scores).build()
    return LibraryTokenizer(library, bos="<s>", eos="</s>", unk="<unk>", add_bos=True)


def same_pairs(tokenizer: Tokenizer, make_model, folder) -> None:
    tokenizer.save(folder)
    ours = CheckpointModel(
        make_model(0, vocab_size=tokenizer.vocab_size, dim=8), tokenizer, name="m", hash="0" * 64
    )
    theirs = Pairs(AutoTokenizer.from_pretrained(folder))
    requests = [Instance("loglikelihood", {}, pair, n) for n, pair in enumerate(PAIRS)]
    for pair, expected in zip(PAIRS, theirs.loglikelihood(requests, disable_tqdm=True), strict=True):
        found = ours.pair(*pair)
        assert (list(found.context), list(found.continuation)) == expected, pair


@pytest.mark.parametrize("add_bos", [True, False])
@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "llama-bpe", "qwen2"])
def test_pairs_of_byte_level_vocabularies(pre, add_bos, make_model, tmp_path):
    same_pairs(byte_level(pre, add_bos), make_model, tmp_path)


def test_pairs_of_a_sentencepiece_vocabulary(make_model, tmp_path):
    same_pairs(sentencepiece(), make_model, tmp_path)


def test_pairs_of_a_trained_vocabulary(tokenizer, make_model, tmp_path):
    same_pairs(tokenizer, make_model, tmp_path)


def test_pairs_of_smollm2(real_data, make_model, tmp_path):
    file = real_data("smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"
    same_pairs(Tokenizer.from_file(file), make_model, tmp_path)
