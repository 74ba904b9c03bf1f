"""Texts side by side."""

from herd.engine.generate import generate
from herd.evals.samples import samples


def test_every_model_continues_every_prompt(make_model, tokenizer):
    models = {name: make_model(seed, max_context=256) for seed, name in enumerate(("teacher", "student"))}
    prompts = ["def area(", [{"role": "user", "content": "Hello"}]]
    got = samples(models, tokenizer, prompts, max_tokens=9)
    assert [g["prompt"] for g in got] == ["def area(", "Hello"]
    for g, prompt in zip(got, prompts, strict=True):
        assert g["outputs"] == {n: generate(m, tokenizer, prompt, max_tokens=9) for n, m in models.items()}
