"""DPO against TRL's trainer on the same batch, and its properties."""

import json

import pytest
import torch

from herd import checkpoint
from herd.data.pairs import PairStream
from herd.data.tuning import AnswerPair, read_tuning
from herd.errors import DataError
from herd.llama.config import ModelConfig
from herd.llama.model import LlamaLM
from herd.text import Rendered, Tokenizer
from herd.train.objectives import batch_loss, dpo

CONFIG = ModelConfig(vocab_size=96, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=48, max_context=64)


def answer(prompt: list[int], ids: list[int]) -> Rendered:
    return Rendered(prompt + ids, [False] * len(prompt) + [True] * len(ids))


def made_pairs(n: int) -> list[AnswerPair]:
    generator = torch.Generator().manual_seed(0)

    def some(length: int) -> list[int]:
        return torch.randint(2, 96, (length,), generator=generator).tolist()

    pairs = []
    for number in range(n):
        prompt = some(3 + number)
        pairs.append(
            AnswerPair(str(number), "pair", answer(prompt, some(5)), answer(prompt, some(4 + number)))
        )
    return pairs


def models() -> tuple[LlamaLM, LlamaLM]:
    return LlamaLM(CONFIG).init_weights(0, std=0.15), LlamaLM(CONFIG).init_weights(1, std=0.15)


@pytest.mark.parametrize(("n", "nll"), [(3, 0.0), (1, 0.2)])
def test_loss_and_gradient_are_those_of_trl(tmp_path, n, nll):
    trl, transformers = pytest.importorskip("trl"), pytest.importorskip("transformers")
    datasets = pytest.importorskip("datasets")
    policy, reference = models()
    for name, model in (("policy", policy), ("reference", reference)):
        checkpoint.save_model(tmp_path / name, model)
    load = transformers.AutoModelForCausalLM.from_pretrained
    pairs = made_pairs(n)
    words = {f"t{i}": i for i in range(96)}
    from tokenizers import Tokenizer as Library
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    library = Library(WordLevel(words, unk_token="t0"))
    library.pre_tokenizer = WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=library, eos_token="t1", pad_token="t0", unk_token="t0"
    )
    rows = [
        {
            "prompt_ids": pair.chosen.ids[: pair.chosen.mask.index(True)],
            "chosen_ids": pair.chosen.ids[pair.chosen.mask.index(True) :],
            "rejected_ids": pair.rejected.ids[pair.rejected.mask.index(True) :],
        }
        for pair in pairs
    ]
    kinds = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, nll]} if nll else {}
    trainer = trl.DPOTrainer(
        model=load(tmp_path / "policy", dtype=torch.float32),
        ref_model=load(tmp_path / "reference", dtype=torch.float32),
        args=trl.DPOConfig(
            output_dir=str(tmp_path / "out"),
            beta=0.3,
            report_to=[],
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            **kinds,
        ),
        train_dataset=datasets.Dataset.from_list([{"prompt": "t3", "chosen": " t4", "rejected": " t5"}]),
        processing_class=tokenizer,
    )
    inputs = trainer.data_collator(rows)
    theirs = trainer.compute_loss(trainer.model, inputs)
    theirs.backward()

    batch = PairStream(pairs, 64, 0, pad_id=0).batch(0, 1)
    loss = batch_loss(policy, dpo(reference, beta=0.3, nll_weight=nll), batch)
    assert int(loss.denominator) == n
    assert abs(float(loss.total) / n - float(theirs)) < 1e-5
    (loss.total / n).backward()
    grads = dict(trainer.model.named_parameters())
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(parameter.grad, grads[name].grad, atol=1e-5, rtol=1e-3)


def test_pairs_in_one_row_or_in_several_have_the_same_loss():
    policy, reference = models()
    objective = dpo(reference)
    together = batch_loss(policy, objective, PairStream(made_pairs(3), 64, 0, pad_id=0).batch(0, 1))
    alone = [
        batch_loss(policy, objective, PairStream([pair], 40, 0, pad_id=0).batch(0, 1))
        for pair in made_pairs(3)
    ]
    assert float(together.total) == pytest.approx(sum(float(loss.total) for loss in alone), abs=1e-5)
    assert float(together.metrics["margin"]) == pytest.approx(
        sum(float(loss.metrics["margin"]) for loss in alone), abs=1e-5
    )


def test_the_untrained_model_has_margin_zero_and_loss_log_2():
    policy, _ = models()
    loss = batch_loss(
        policy, dpo(policy, nll_weight=0.0), PairStream(made_pairs(2), 64, 0, pad_id=0).batch(0, 1)
    )
    assert float(loss.total) == pytest.approx(2 * 0.693147, abs=1e-5)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["the sky is blue and the grass is green " * 9], 520)


ROWS = {
    "pair": {"prompt": "The sky is", "chosen": " blue", "rejected": " green"},
    "text pair, implicit prompt": {"chosen": "the sky is blue", "rejected": "the sky is green"},
    "pair of messages": {
        "prompt": [{"role": "user", "content": "sky?"}],
        "chosen": [{"role": "assistant", "content": "blue"}],
        "rejected": [{"role": "assistant", "content": "green"}],
    },
    "pair of messages, implicit prompt": {
        "chosen": [{"role": "user", "content": "sky?"}, {"role": "assistant", "content": "blue"}],
        "rejected": [{"role": "user", "content": "sky?"}, {"role": "assistant", "content": "green"}],
    },
    "ShareGPT pair": {
        "conversations": [{"from": "human", "value": "sky?"}],
        "chosen": {"from": "gpt", "value": "blue"},
        "rejected": {"from": "gpt", "value": "green"},
    },
}


@pytest.mark.parametrize("mask_ends", [False, True])
@pytest.mark.parametrize("name", ROWS)
def test_explicit_and_implicit_pairs_train_the_answers_only(tokenizer, tmp_path, name, mask_ends):
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps(ROWS[name]) + "\n")
    data = read_tuning([file], tokenizer, mask_ends=mask_ends)
    (pair,) = data.require_pairs()
    assert pair.format == name
    for rendered, colour in ((pair.chosen, "blue"), (pair.rejected, "green")):
        trained = [id_ for id_, mask in zip(rendered.ids, rendered.mask, strict=True) if mask]
        text = tokenizer.decode(trained)
        assert text.strip().startswith(colour)
        ended = text.strip() != colour
        assert ended == (not mask_ends)


def test_equal_answers_and_dialogs_are_set_aside_or_refused(tokenizer, tmp_path):
    file = tmp_path / "pairs.jsonl"
    same = {"prompt": "a", "chosen": "blue", "rejected": "blue"}
    file.write_text(json.dumps(same) + "\n" + json.dumps(ROWS["pair"]) + "\n")
    data = read_tuning([file], tokenizer)
    assert [row.reason for row in data.set_aside] == ["chosen and rejected are equal"]
    assert data.set_aside[0].where == f"{file}:1"
    with pytest.raises(DataError, match="use --objective dpo"):
        data.require_examples()
    file.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    with pytest.raises(DataError, match="dpo needs pairs"):
        read_tuning([file], tokenizer).require_pairs()
