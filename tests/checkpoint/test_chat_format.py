"""A checkpoint's dialogs are written in its own format, and its stop tokens and sampling settings are kept."""

import json
import math
import os
import warnings
from pathlib import Path

import pytest
from gguf import GGUFWriter
from transformers import AutoTokenizer

import herd
from herd import checkpoint
from herd.checkpoint.chat_format import generation_defaults
from herd.cli import run
from herd.engine import Engine, Request, Sampling
from herd.errors import ChatError, CheckpointError
from herd.evals.local import CheckpointModel
from herd.evals.tasks.task import Generate, Rank
from herd.quant.formats import Q8_0, scheme
from herd.text.chat_format import render
from herd.text.llama3_chat import Llama3Chat
from herd.text.ranks_tokenizer import SPECIAL_TOKENS, RanksTokenizer
from herd.text.tokenizer_json import CHAT_TEMPLATE

QUESTION = [{"role": "user", "content": "The quick brown fox?"}]
HEADER = "'<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n'"
TURN = "{{ " + HEADER + " + m['content'] + '<|eot_id|>' }}"
TURNS = "{% for m in messages %}" + TURN + "{% endfor %}"
PROMPT = (
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
TAKE_SYSTEM = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
)
DATED_SYSTEM = (
    "{{ '<|start_header_id|>system<|end_header_id|>\\n\\nCutting Knowledge Date: December 2023\\n' "
    "+ 'Today Date: ' + date_string + '\\n\\n' + system + '<|eot_id|>' }}"
)
OTHER_FORMATS = {
    "ChatML": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}",
    "DeepSeek": "{{ bos_token }}{% for m in messages %}{{ '<｜User｜>' + m.content }}{% endfor %}<｜Assistant｜>",
    "Llama 2": "{{ bos_token }}{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}",
    "Zephyr": "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}",
    "Gemma": "{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content }}<end_of_turn>\n{% endfor %}",
    "Alpaca": "{% for m in messages %}### Instruction:\n{{ m.content }}\n\n### Response:\n{% endfor %}",
    "another end of turn": "{{ bos_token }}" + TURNS.replace("eot_id", "end_of_text") + PROMPT,
    "a system message of its own": "{{ bos_token }}"
    "{{ '<|start_header_id|>system<|end_header_id|>\\n\\nYou are Bob.<|eot_id|>' }}" + TURNS + PROMPT,
    "the system message dropped": "{{ bos_token }}{% for m in messages if m.role != 'system' %}"
    + TURN
    + "{% endfor %}"
    + PROMPT,
    "one name of a list": [
        {"name": "default", "template": "{{ messages[0].content }}"},
        {"name": "x", "template": CHAT_TEMPLATE},
    ],
}
INVALID = {
    "an exception": "{{ raise_exception('this model has no dialogs') }}",
    "broken Jinja": "{% for m in messages %}{{ m.content }}",
    "an escape from the sandbox": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
}
LLAMA3_FORMATS = {
    "Herd's": CHAT_TEMPLATE,
    "Llama 3's": "{% for m in messages %}{% set text = " + HEADER + " + m['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.first %}{% set text = bos_token + text %}{% endif %}{{ text }}{% endfor %}" + PROMPT,
    "without begin_of_text": TURNS + PROMPT,
    "Llama 3.1's dates": "{{ bos_token }}"
    + TAKE_SYSTEM
    + "{% if not date_string is defined %}{% set date_string = '26 Jul 2024' %}{% endif %}"
    + DATED_SYSTEM
    + TURNS.replace("m['content']", "m['content'] | trim")
    + PROMPT,
    "Llama 3.2's today": "{{ bos_token }}"
    + TAKE_SYSTEM
    + "{% set date_string = strftime_now('%d %b %Y') %}"
    + DATED_SYSTEM
    + TURNS
    + PROMPT,
    "tags of transformers' loss mask": "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
    + ("{% generation %}" + TURN + "{% endgeneration %}{% else %}" + TURN + "{% endif %}{% endfor %}")
    + PROMPT,
    "a list of templates": [
        {"name": "tool_use", "template": "{{ 1 }}"},
        {"name": "default", "template": CHAT_TEMPLATE},
    ],
    "none": None,
}


def change(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def folder(tmp_path, make_model, tokenizer):
    """A checkpoint of Llama 3.1's format, to be changed by a test."""
    model = make_model(
        vocab_size=tokenizer.vocab_size, dim=64, n_heads=4, n_kv_heads=2, ffn_dim=96, head_dim=16
    )
    checkpoint.save_model(tmp_path / "model", model, tokenizer)
    return tmp_path / "model"


@pytest.mark.parametrize("name", OTHER_FORMATS)
def test_dialogs_are_written_by_another_template_as_transformers_writes_them(folder, name):
    change(folder / "tokenizer_config.json", chat_template=OTHER_FORMATS[name])
    found = checkpoint.load_tokenizer(folder)
    oracle = AutoTokenizer.from_pretrained(folder)
    dialog = [*QUESTION, {"role": "assistant", "content": " Jumps. "}, *QUESTION]
    for prompt in (True, False):
        expected = oracle.apply_chat_template(dialog, add_generation_prompt=prompt, return_dict=False)
        assert render(dialog, found, generation_prompt=prompt).ids == expected


@pytest.mark.parametrize("name", INVALID)
def test_an_invalid_template_is_refused_for_dialogs_with_the_folder_and_the_cure(folder, name):
    change(folder / "tokenizer_config.json", chat_template=INVALID[name])
    found = checkpoint.load_tokenizer(folder)
    assert found.chat is None
    with pytest.raises(ChatError) as raised:
        render(QUESTION, found)
    message = str(raised.value)
    assert message.startswith(f"{folder}: the chat template")
    assert "--complete" in message
    assert "\n" not in message


@pytest.mark.parametrize("name", LLAMA3_FORMATS)
def test_a_template_that_writes_llama_3_dialogs_is_accepted(folder, name):
    change(folder / "tokenizer_config.json", chat_template=LLAMA3_FORMATS[name])
    assert isinstance(checkpoint.load_tokenizer(folder).chat, Llama3Chat)


def test_the_template_file_replaces_the_one_in_the_configuration(folder):
    (folder / "chat_template.jinja").write_text(OTHER_FORMATS["ChatML"])
    found = checkpoint.load_tokenizer(folder)
    assert found.decode(render(QUESTION, found).ids).startswith("<|im_start|>user")


def test_a_vocabulary_with_other_special_names_keeps_them_and_its_template(tmp_path, make_model, tokenizer):
    names = list(SPECIAL_TOKENS)
    names[0], names[1], names[6] = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>"
    renamed = RanksTokenizer(tokenizer.ranks, {name: tokenizer.n_ranks + i for i, name in enumerate(names)})
    model = make_model(vocab_size=tokenizer.vocab_size)
    checkpoint.save_model(
        tmp_path / "m", model, renamed.with_settings(chat_template=OTHER_FORMATS["DeepSeek"])
    )
    found = checkpoint.load_tokenizer(tmp_path / "m")
    assert found.decode(render(QUESTION, found).ids) == (
        "<｜begin▁of▁sentence｜><｜User｜>The quick brown fox?<｜Assistant｜>"
    )
    assert tokenizer.n_ranks + 6 in render(QUESTION, found).ids
    change(tmp_path / "m" / "tokenizer_config.json", chat_template=None)
    problem = checkpoint.load_tokenizer(tmp_path / "m").chat_problem
    assert problem.startswith(f"{tmp_path / 'm'}: has no chat template")


def test_names_of_the_first_llama_3_are_accepted(tmp_path, make_model, tokenizer):
    later = {"<|finetune_right_pad_id|>", "<|step_id|>", "<|eom_id|>", "<|python_tag|>"}
    names = [f"<|reserved_special_token_x{i}|>" if n in later else n for i, n in enumerate(SPECIAL_TOKENS)]
    first = RanksTokenizer(tokenizer.ranks, {name: tokenizer.n_ranks + i for i, name in enumerate(names)})
    checkpoint.save_model(tmp_path / "m", make_model(vocab_size=tokenizer.vocab_size), first)
    assert isinstance(checkpoint.load_tokenizer(tmp_path / "m").chat, Llama3Chat)


def test_chat_evaluation_and_training_on_dialogs_are_refused_but_completion_and_scoring_work(
    folder, tmp_path, capsys
):
    change(folder / "tokenizer_config.json", chat_template=INVALID["an exception"])
    assert run(["chat", str(folder), "-p", "hello"]) == 1
    assert f"{folder}: the chat template" in capsys.readouterr().err
    assert run(["chat", str(folder), "-p", "The quick", "--complete", "--max-tokens", "3"]) == 0

    model, tokenizer = herd.load(folder)
    asked = CheckpointModel(model, tokenizer, name="other", hash="0", mode="instruct")
    with pytest.raises(ChatError):
        list(asked.answer([Generate(tuple(QUESTION), max_tokens=2)]))
    (_, answer), *_ = asked.answer([Rank((("The quick", " brown"), ("The quick", " fox")))])
    assert len(answer.likelihoods) == 2
    with pytest.raises(ChatError):
        herd.generate(model, tokenizer, QUESTION)

    recipe = tmp_path / "sft.yaml"
    recipe.write_text(
        f"name: sft\nout: {tmp_path / 'out'}\nmodel: {{start: {folder}}}\n"
        "data: {kind: made_dialogs, count: 4}\nobjective: {kind: sft}\noptimizer: {kind: adamw, lr: 1e-3}\n"
        "train: {context: 64, steps: 1, batch_size: 1}\n"
    )
    capsys.readouterr()
    assert run(["train", str(recipe)]) == 1
    assert f"{folder}: the chat template" in capsys.readouterr().err


def test_quantizing_exporting_and_importing_keep_the_template_and_the_stop_tokens(folder, tmp_path):
    stops = {checkpoint.load_tokenizer(folder).n_ranks + n for n in (1, 8, 9, 40, 41)}
    change(folder / "tokenizer_config.json", chat_template=OTHER_FORMATS["ChatML"])
    change(folder / "generation_config.json", eos_token_id=sorted(stops)[-2:])
    checkpoint.export_gguf(folder, tmp_path / "m.gguf")
    checkpoint.import_gguf(tmp_path / "m.gguf", tmp_path / "plain")
    checkpoint.import_hf(folder, tmp_path / "hf")
    checkpoint.quantize_folder(checkpoint.ImportSource(folder), tmp_path / "quantized", scheme(Q8_0))
    checkpoint.export_hf(tmp_path / "quantized", tmp_path / "unpacked")
    for copy in ("plain", "hf", "quantized", "unpacked"):
        found = checkpoint.load_tokenizer(tmp_path / copy)
        assert found.chat_template == OTHER_FORMATS["ChatML"], copy
        assert found.decode(render(QUESTION, found).ids).startswith("<|im_start|>user"), copy
        assert found.stop_ids == stops, copy


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("as_list", [False, True])
def test_generation_ends_at_every_stop_token_that_any_file_names(folder, file, as_list):
    stop, wish = 97, Sampling(max_tokens=3, logit_bias={97: 100.0})
    model, tokenizer = herd.load(folder)
    assert Engine(model, tokenizer).run([Request([5], wish)])[0].ids == [stop, stop, stop]
    change(folder / file, eos_token_id=[stop] if as_list else stop)
    model, tokenizer = herd.load(folder)
    assert tokenizer.stop_ids >= {stop, tokenizer.eos_id, tokenizer.eot_id, tokenizer.eom_id}
    assert Engine(model, tokenizer).run([Request([5], wish)])[0].finish_reason == "stop"


def test_the_end_token_of_the_tokenizer_configuration_is_a_stop_token(folder):
    change(folder / "tokenizer_config.json", eos_token={"content": "<|reserved_special_token_7|>"})
    found = checkpoint.load_tokenizer(folder)
    assert found.special_tokens["<|reserved_special_token_7|>"] in found.stop_ids


def test_stop_tokens_outside_the_vocabulary_are_said_and_malformed_ones_refused(folder):
    change(folder / "generation_config.json", eos_token_id=[9_999_999, 5])
    with pytest.warns(UserWarning, match="9999999"):
        assert 5 in checkpoint.load_tokenizer(folder).stop_ids
    change(folder / "generation_config.json", eos_token_id="</s>")
    with pytest.raises(CheckpointError, match="eos_token_id='</s>'"):
        checkpoint.load_tokenizer(folder)


def test_sampling_defaults_come_from_the_generation_configuration(folder):
    path = folder / "generation_config.json"
    path.write_text(json.dumps({"do_sample": True, "temperature": None, "top_p": None, "top_k": None}))
    neutral = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    assert generation_defaults(folder) == neutral
    own = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.05}
    path.write_text(json.dumps({"do_sample": True} | own))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert generation_defaults(folder) == own
    assert Sampling(**generation_defaults(folder)).top_k == 20
    path.write_text(json.dumps({"do_sample": False} | own))
    greedy = generation_defaults(folder)
    assert greedy["temperature"] == 0
    assert greedy["repetition_penalty"] == 1.05
    path.write_text(json.dumps({"do_sample": True, "num_beams": 4, "typical_p": 1.0}))
    with pytest.warns(UserWarning, match="num_beams cannot be followed"):
        generation_defaults(folder)
    path.write_text(json.dumps({"do_sample": True, "top_k": -1}))
    assert generation_defaults(folder)["top_k"] == 0
    wrong = {"temperature": "hot", "top_p": 1.5, "top_k": True, "min_p": -1, "repetition_penalty": 0}
    for name, value in [*wrong.items(), ("temperature", math.nan), ("temperature", -1), ("top_p", 0)]:
        path.write_text(json.dumps({name: value}))
        with pytest.raises(CheckpointError, match=rf"generation_config\.json: {name}={value!r} is"):
            generation_defaults(folder)
    path.unlink()
    assert generation_defaults(folder)["temperature"] == 0


def test_sampling_defaults_of_a_gguf_file_and_of_the_catalogue(folder, tmp_path):
    path = tmp_path / "model.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_float32("general.sampling.temp", 0.6)
    writer.add_int32("general.sampling.top_k", 20)
    writer.add_float32("general.sampling.penalty_repeat", 1.05)
    writer.add_int32("general.sampling.mirostat", 2)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    own = {"temperature": 0.6, "top_p": 1.0, "top_k": 20, "min_p": 0.0, "repetition_penalty": 1.05}
    with pytest.warns(UserWarning, match="general.sampling.mirostat cannot be followed"):
        assert checkpoint.ModelSource(path).sampling_defaults == own
    smollm2 = path.with_name("SmolLM2-135M-Instruct.Q4_1.gguf")  # the file of a name in the catalogue
    path.rename(smollm2)
    recommended = {"temperature": 0.2, "top_p": 0.9, "repetition_penalty": 1.1}
    assert checkpoint.ModelSource(smollm2).sampling_defaults == recommended
    assert checkpoint.ModelSource(folder).sampling_defaults == generation_defaults(folder)


@pytest.mark.parametrize(
    "name, beginning",
    [
        ("hf-deepseek-like", "<｜begin▁of▁sentence｜><｜User｜>"),
        ("chatml_eos_808.gguf", "<|im_start|>user\n"),
        ("pre_smaug-bpe.gguf", "<|begin_of_text|><|start_header_id|>user"),
    ],
)
def test_reported_checkpoints_chat_in_their_own_format(tmp_path, capsys, name, beginning):
    source = Path(os.environ.get("HERD_TEST_CASES", "missing")) / name
    if not source.exists():
        pytest.skip("needs HERD_TEST_CASES")
    out = tmp_path / "model"
    assert run(["import", str(source), str(out)]) == 0
    found = checkpoint.load_tokenizer(out)
    assert found.decode(render(QUESTION, found).ids).startswith(beginning)
    assert run(["chat", str(out), "-p", "hello", "--max-tokens", "2"]) == 0
    assert run(["chat", str(out), "-p", "hello", "--complete", "--max-tokens", "2"]) == 0
    if name.startswith("chatml"):
        assert 808 in found.stop_ids
