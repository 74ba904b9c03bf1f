"""The derived files, read by `tokenizers` and `transformers` without our code, give the same ids."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as library

from herd.errors import TokenizerError
from herd.text import Tokenizer, render
from herd.text.ranks import spell


@pytest.fixture(scope="module")
def folder(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    small.save(folder, model_max_length=2048)
    return folder


@pytest.fixture(scope="module")
def meta_folder(meta, tmp_path_factory):
    folder = tmp_path_factory.mktemp("meta")
    meta.save(folder)
    return folder


@pytest.fixture(scope="module")
def hf(folder):
    return library.from_file(str(folder / "tokenizer.json"))


@settings(max_examples=200)
@given(text=st.text(st.characters(exclude_categories=["Cs"])).filter(lambda text: "<|" not in text))
def test_any_text_has_the_same_ids(small, hf, text):
    assert hf.encode(text, add_special_tokens=False).ids == small.encode(text)
    assert hf.encode(text).ids == small.encode(text, bos=True)
    assert hf.decode(small.encode(text), skip_special_tokens=False) == text


def test_ten_languages_have_the_same_ids_everywhere(meta, meta_folder, real_data):
    from transformers import AutoTokenizer

    hf = library.from_file(str(meta_folder / "tokenizer.json"))
    auto = AutoTokenizer.from_pretrained(meta_folder)
    assert len(auto) == meta.vocab_size
    for file in sorted(real_data("ud_pud_parallel").glob("??.txt")):
        text = file.read_text(encoding="utf-8")[:5_000]
        ids = meta.encode(text, bos=True)
        assert hf.encode(text).ids == ids
        assert auto(text)["input_ids"] == ids
        assert auto.decode(ids, skip_special_tokens=True) == text
        turns = zip(["user", "assistant"] * 5, text.splitlines()[:10], strict=True)
        dialog = [{"role": role, "content": line} for role, line in turns]
        templated = auto.apply_chat_template(
            dialog, tokenize=True, return_dict=True, add_generation_prompt=True
        )
        assert templated["input_ids"] == render(dialog, meta, generation_prompt=True).ids


def test_save_writes_four_files(small, folder):
    names = {"tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
    assert {path.name for path in folder.iterdir()} == names
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config["model_max_length"] == 2048
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "<|start_header_id|>" in config["chat_template"]
    assert config["added_tokens_decoder"][str(small.eot_id)]["content"] == "<|eot_id|>"


def test_transformers_reads_the_special_tokens(small, folder):
    from transformers import AutoTokenizer

    auto = AutoTokenizer.from_pretrained(folder)
    ids = (small.bos_id, small.eos_id, small.pad_id)
    assert (auto.bos_token_id, auto.eos_token_id, auto.pad_token_id) == ids
    assert auto.convert_tokens_to_ids("<|python_tag|>") == small.python_tag_id
    assert auto.model_max_length == 2048


def test_saved_files_are_read_back(small, folder, tmp_path):
    assert Tokenizer.from_folder(folder) == small
    assert Tokenizer.from_file(folder) == small
    assert Tokenizer.from_file(folder / "tokenizer.model") == small
    assert Tokenizer.from_file(folder / "tokenizer.json") == small
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    assert Tokenizer.from_folder(tmp_path) == small
    small.save(tmp_path)  # over what is there
    assert Tokenizer.from_folder(tmp_path) == small


def test_a_folder_whose_files_disagree_is_refused(folder, tmp_path, small, sample):
    small.save(tmp_path)
    Tokenizer.train([sample * 3], 800).save(tmp_path / "other")
    (tmp_path / "other" / "tokenizer.json").replace(tmp_path / "tokenizer.json")
    with pytest.raises(TokenizerError, match="differ"):
        Tokenizer.from_folder(tmp_path)


def _hugging_face_merges(ranks: dict[bytes, int]) -> list[list[str]]:
    """Every split of every token, as Hugging Face's own conversion of tiktoken files lists them."""
    found = []
    for token, rank in ranks.items():
        splits = [(token[:i], token[i:]) for i in range(1, len(token))]
        splits = [(left, right) for left, right in splits if left in ranks and right in ranks]
        found += [(rank, ranks[left], ranks[right], left, right) for left, right in splits]
    return [[spell(left), spell(right)] for *_, left, right in sorted(found)]


def test_meta_style_export_is_read(small, folder, tmp_path):
    """Meta's release on Hugging Face: all splits as merges, other names for reserved tokens. Ids are what counts."""
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["merges"] = _hugging_face_merges(small.ranks)
    content["added_tokens"][5]["content"] = "<|reserved_special_token_2|>"
    for i, token in enumerate(content["added_tokens"][11:]):
        token["content"] = f"<|reserved_special_token_{i + 3}|>"
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    read = Tokenizer.from_file(path)
    assert read.ranks == small.ranks
    assert read.special_tokens["<|reserved_special_token_3|>"] == small.n_ranks + 11
    assert (read.eot_id, read.pad_id, read.python_tag_id) == (small.eot_id, small.pad_id, small.python_tag_id)


def test_llama_3_release_without_the_newer_names_is_read(small, folder, tmp_path):
    content = json.loads((folder / "tokenizer.json").read_text())
    for i, number in enumerate((2, 3, 4, 5, 8, 10, *range(11, 256))):
        content["added_tokens"][number]["content"] = f"<|reserved_special_token_{i}|>"
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    read = Tokenizer.from_folder(tmp_path)
    assert (read.pad_id, read.eom_id, read.python_tag_id) == (small.pad_id, small.eom_id, small.python_tag_id)


def _changed(folder, keys, value) -> dict:
    content = part = json.loads((folder / "tokenizer.json").read_text())
    for key in keys[:-1]:
        part = part[key]
    part[keys[-1]] = value
    return content


@pytest.mark.parametrize(
    "keys, value",
    [
        (["normalizer"], {"type": "NFC"}),
        (["pre_tokenizer", "pretokenizers", 0, "pattern", "Regex"], r"\\s+|\\S+"),
        (["model", "vocab", "▁the"], 700),
        (["added_tokens", 3, "content"], "<|im_end|>"),
        (["added_tokens", 3, "special"], False),
        (["model", "merges"], []),
        (["model", "ignore_merges"], False),
    ],
)
def test_a_vocabulary_that_ranks_cannot_express_is_read_by_the_library(folder, tmp_path, keys, value):
    content = _changed(folder, keys, value)
    if keys[-1] == "merges":
        content["model"]["ignore_merges"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    read = Tokenizer.from_folder(tmp_path)
    expected = library.from_file(str(tmp_path / "tokenizer.json"))
    for text in ("Hello, world! 12345", "  naïve\n\n\tfoo(bar)"):
        assert read.encode(text) == expected.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize(
    "keys, value",
    [
        (["model", "type"], "Unigram"),
        (["model", "vocab"], []),
        (["model", "vocab", "!!!!"], "x"),
        (["model", "merges", 0], "a"),
        (["pre_tokenizer", "pretokenizers", 0, "pattern", "Regex"], "("),
        (["added_tokens", 3, "id"], "x"),
    ],
)
def test_a_malformed_tokenizer_json_is_refused_in_one_line(folder, tmp_path, keys, value):
    (tmp_path / "tokenizer.json").write_text(json.dumps(_changed(folder, keys, value)))
    refusal = r"tokenizer\.json: the tokenizers library cannot read it"
    with pytest.raises(TokenizerError, match=refusal) as caught:
        Tokenizer.from_folder(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"', "{}", "[" * 100_000])
def test_files_that_are_no_tokenizer_json_are_refused(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)
