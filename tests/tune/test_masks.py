"""The masks of every kind of row on TRL's page of data formats, of ShareGPT, Alpaca and tools: against TRL itself.

TRL's `SFTTrainer` tokenizes the same rows with SmolLM2's vocabulary and the same chat template, in which the
assistant's part is marked with ``{% generation %}``. The differences that are intended are written in `DIFFERENCES`.
"""

import json

import pytest

from herd import checkpoint
from herd.data.tuning import read_tuning
from herd.llama.config import ModelConfig
from herd.llama.model import LlamaLM
from herd.text.tool_support import with_tool_support

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "control_light",
            "description": "Control a light.",
            "parameters": {
                "type": "object",
                "properties": {"room": {"type": "string"}},
                "required": ["room"],
            },
        },
    }
]
CALL = {"type": "function", "function": {"name": "control_light", "arguments": {"room": "kitchen"}}}
SKY = [{"role": "user", "content": "What color is the sky?"}, {"role": "assistant", "content": "It is blue."}]
TURNS = [*SKY, {"role": "user", "content": "Where?"}, {"role": "assistant", "content": "In the sky."}]
TOOL_DIALOG = [
    {"role": "user", "content": "Light on in the kitchen."},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "control_light", "content": "done"},
    {"role": "assistant", "content": "Done!"},
]
LAST = {"role": "assistant", "content": "It is blue."}

# name -> (our row, TRL's row or None if TRL trains no such row by supervised fine-tuning)
ROWS = {
    "language modeling": ({"text": "The sky is blue."}, {"text": "The sky is blue."}),
    "language modeling, messages": ({"messages": TURNS}, {"messages": TURNS}),
    "prompt and completion": (
        {"prompt": "The sky is", "completion": " blue."}, {"prompt": SKY[:1], "completion": [LAST]},
    ),
    "prompt and completion, messages": (
        {"prompt": TURNS[:3], "completion": TURNS[3:]}, {"prompt": TURNS[:3], "completion": TURNS[3:]},
    ),
    "tools": ({"messages": TOOL_DIALOG, "tools": TOOLS}, {"messages": TOOL_DIALOG, "tools": TOOLS}),
    "tools as JSON text": (
        {"messages": TOOL_DIALOG, "tools": json.dumps(TOOLS)}, {"messages": TOOL_DIALOG, "tools": json.dumps(TOOLS)},
    ),
    "system": ({"messages": [{"role": "system", "content": "Be brief."}, *SKY]},) * 2,
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": SKY[0]["content"]}, {"from": "gpt", "value": "It is blue."}]},
        {"messages": SKY},
    ),
    "Alpaca": ({"instruction": SKY[0]["content"], "input": "", "output": "It is blue."}, {"messages": SKY}),
    "Alpaca with history": (
        {"instruction": "Where?", "output": "In the sky.", "history": [[SKY[0]["content"], "It is blue."]]},
        {"messages": TURNS},
    ),
}  # fmt: skip
DIFFERENCES = {
    # TRL trains the plain text "The sky is blue." after a plain prompt. A chat model is asked in its chat format here
    "prompt and completion": "prompts are questions in the chat format"
}
ASIDE = {
    "prompt-only": ({"prompt": "The sky is"}, "a prompt without an answer"),
    "prompt-only, messages": ({"prompt": SKY[:1]}, "a prompt without an answer"),
    "unpaired preference, bad": (
        {"prompt": "The sky is", "completion": " green.", "label": False}, "an answer labelled as bad",
    ),
    "stepwise supervision": (
        {"prompt": "Which is larger?", "completions": ["9.8"], "labels": [True]}, "steps with labels",
    ),
    "no assistant": ({"messages": SKY[:1]}, "none of its tokens is trained"),
    "all weights 0": ({"messages": [SKY[0], SKY[1] | {"weight": 0}]}, "none of its tokens is trained"),
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(real_data):
    file = real_data("smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"
    return with_tool_support(checkpoint.load_tokenizer(file))


def ours(tokenizer, tmp_path, row) -> tuple[list[int], list[bool]]:
    file = tmp_path / "row.jsonl"
    file.write_text(json.dumps(row) + "\n")
    (example,) = read_tuning([file], tokenizer).require_examples()
    return example.rendered.ids, example.rendered.mask


@pytest.fixture(scope="module")
def theirs(tokenizer, tmp_path_factory):
    """Return a function that gives TRL's ids and the mask of its labels for a row."""
    trl, transformers = pytest.importorskip("trl"), pytest.importorskip("transformers")
    datasets = pytest.importorskip("datasets")
    folder = tmp_path_factory.mktemp("trl")
    config = ModelConfig(tokenizer.vocab_size, 16, 1, 2, 1, 16, max_context=512)
    checkpoint.save_model(folder / "model", LlamaLM(config).init_weights(0), tokenizer)
    end = "{{ '<|im_end|>' + '\\n' }}"
    templates = {}
    for name, text in (("plain", tokenizer.chat_template), ("tools", tokenizer.tool_template)):
        if name == "plain":
            head, tail = text.split("{{'<|im_start|>' + message['role']")
            body = (
                "{% if message['role'] == 'assistant' %}{{ '<|im_start|>assistant\\n' }}{% generation %}"
                "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}"
                "{% else %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] }}"
                + end
                + "{% endif %}"
            )
            templates[name] = head + body + "{% endfor %}" + tail.split("{% endfor %}")[1]
        else:
            text = text.replace(
                "    {{- '<|im_start|>' + message['role'] + '\\n' + (message['content'] or '') }}\n",
                "    {{- '<|im_start|>' + message['role'] + '\\n' }}"
                "{%- if message['role'] == 'assistant' %}{% generation %}{{ message['content'] or '' }}",
            )
            text = text.replace(
                "    {{- '<|im_end|>\\n' }}\n{%- endfor %}",
                "{{ '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}"
                "{%- else %}{{ (message['content'] or '') + '<|im_end|>\\n' }}{%- endif %}{%- endfor %}",
            )
            templates[name] = text

    def labels(row) -> tuple[list[int], list[bool]]:
        loaded = transformers.AutoTokenizer.from_pretrained(folder / "model")
        loaded.chat_template = templates["tools" if "tools" in row else "plain"]
        talks = "messages" in row
        trainer = trl.SFTTrainer(
            model=transformers.AutoModelForCausalLM.from_pretrained(folder / "model"),
            args=trl.SFTConfig(
                output_dir=str(folder / "out"),
                report_to=[],
                use_cpu=True,
                bf16=False,
                max_length=None,
                assistant_only_loss=talks,
                gradient_checkpointing=False,
            ),
            train_dataset=datasets.Dataset.from_list([row]),
            processing_class=loaded,
        )
        example = trainer.train_dataset[0]
        ids = list(example["input_ids"])
        batch = trainer.data_collator([example])
        return ids, [label != -100 for label in batch["labels"][0].tolist()]

    return labels


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ROWS)
def test_tokens_and_masks_are_trls(tokenizer, theirs, tmp_path, name):
    row, same = ROWS[name]
    if name in DIFFERENCES:
        row = row | {"prompt": same["prompt"][0]["content"], "completion": same["completion"][0]["content"]}
    ids, mask = ours(tokenizer, tmp_path, row)
    their_ids, their_mask = theirs(same)
    assert tokenizer.decode(ids) == tokenizer.decode(their_ids)
    assert ids == their_ids
    if name.startswith("prompt and completion"):
        # TRL also trains what the template writes after the end of the answer: a line break
        assert tokenizer.decode(ids[-1:]) == "\n"
        assert their_mask[-1]
        their_mask[-1] = False
    assert mask == their_mask


@pytest.mark.parametrize("name", ASIDE)
def test_rows_that_cannot_be_imitated_are_set_aside_with_the_reason(tokenizer, tmp_path, name):
    row, reason = ASIDE[name]
    file = tmp_path / "row.jsonl"
    file.write_text(json.dumps({"messages": SKY}) + "\n" + json.dumps(row) + "\n")
    data = read_tuning([file], tokenizer)
    assert len(data.examples) == 1
    assert [aside.where for aside in data.set_aside] == [f"{file}:2"]
    assert reason in data.set_aside[0].reason


def test_a_good_unpaired_answer_and_a_weight_are_trained_as_said(tokenizer, tmp_path):
    ids, mask = ours(tokenizer, tmp_path, {"prompt": "Sky?", "completion": "Blue.", "label": True})
    assert tokenizer.decode([i for i, trained in zip(ids, mask, strict=True) if trained]) == "Blue.<|im_end|>"
    messages = [SKY[0], SKY[1] | {"weight": 0}, *TURNS[2:]]
    ids, mask = ours(tokenizer, tmp_path, {"messages": messages})
    assert (
        tokenizer.decode([i for i, trained in zip(ids, mask, strict=True) if trained])
        == "In the sky.<|im_end|>"
    )
