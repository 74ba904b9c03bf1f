"""`herd serve --adapter NAME=FOLDER`: names that chat clients may ask for, and what is refused."""

import pytest

from herd import checkpoint
from herd.checkpoint.adapters import save_adapter
from herd.cli.serve import put_adapters
from herd.engine import Engine, Request, Sampling
from herd.llama.lora import add_lora, lora_layers
from herd.serve.chat import ReadyPrompt, ServedModel
from herd.serve.errors import NotFound
from herd.serve.models import ModelPool, ModelSlot


def served(names: frozenset[str]) -> ServedModel:
    return ServedModel("base", None, None, 64, adapters=names)  # type: ignore[arg-type]


def test_an_adapter_on_disk_answers_by_its_name(base, tmp_path):
    tuned = add_lora(checkpoint.load_model(base), 4, 2.0)
    for layer in lora_layers(tuned).values():
        layer.lora_B.data.normal_(std=0.3)
    save_adapter(tmp_path / "adapter", tuned, str(base))
    model = checkpoint.load_model(base)
    put_adapters(model, {"support": tmp_path / "adapter"})
    prompt = ReadyPrompt([3, 4, 5], Sampling(max_tokens=8), adapter="support")
    found = Engine(model, None).run([prompt.request("", ""), Request([3, 4, 5], Sampling(max_tokens=8))])
    expected = [
        Engine(each, None).run([Request([3, 4, 5], Sampling(max_tokens=8))])[0]
        for each in (tuned, checkpoint.load_model(base))
    ]
    assert [done.ids for done in found] == [done.ids for done in expected]


def test_names_are_checked():
    pool = ModelPool([ModelSlot.of(served(frozenset({"support"})))])
    assert pool.find("base") is pool.find(None) is pool.find("support")
    with pytest.raises(NotFound, match="this server has: base, support"):
        pool.find("other")
