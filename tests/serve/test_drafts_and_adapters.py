"""Drafts and adapters of several models: whose they are, what they answer and weigh, and what is refused."""

import gc
import weakref

import httpx
import pytest

from conftest import running
from herd.checkpoint import ModelSource, checkpoint_hash, load_model, load_tokenizer, save_model
from herd.checkpoint.adapters import save_adapter
from herd.checkpoint.lineage import Lineage
from herd.cli.serve import OpenOptions, _slot, serve_command
from herd.cli.serve_extras import assign_adapters, assign_drafts
from herd.engine import Engine, Request, Sampling
from herd.engine.memory import page_nbytes
from herd.errors import ConfigError, EngineError, HerdError
from herd.llama import ModelConfig
from herd.llama.lora import add_lora, lora_layers
from herd.llama.model import LlamaLM
from herd.serve.models import ModelPool
from herd.text import Tokenizer

PROMPT = "six times seven"
NAMES = [{"small", "/models/small"}, {"other"}]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of two models with one tokenizer, a draft, a model with another tokenizer, and an adapter."""
    root = tmp_path_factory.mktemp("models")
    text = "six times seven is forty-two, over and over"
    tokenizer = Tokenizer.train([text] * 3, 530)

    def config(vocab_size, dim, n_layers):
        return ModelConfig(vocab_size, dim, n_layers, 4, 2, 48, rope_theta=10_000.0, max_context=512)

    for seed, (name, dim, n_layers) in enumerate((("small", 32, 2), ("other", 48, 2), ("draft", 16, 1))):
        model = LlamaLM(config(tokenizer.vocab_size, dim, n_layers)).init_weights(seed, std=0.2)
        save_model(root / name, model, tokenizer, lineage=Lineage(name=name, stage="sft"))
    foreign = Tokenizer.train([text[::-1]] * 3, 525)
    save_model(root / "foreign", LlamaLM(config(foreign.vocab_size, 16, 1)).init_weights(3), foreign)
    save_tuned(root, "small", "support")
    return root


def save_tuned(root, base, name, base_name=None, lineage=None):
    """Write a random adapter on the model ``base``."""
    tuned = add_lora(load_model(root / base), 4, 2.0)
    for layer in lora_layers(tuned).values():
        layer.lora_B.data.normal_(std=0.3)
    save_adapter(root / name, tuned, base_name or str(root / base), lineage=lineage)
    return root / name


def options(**more):
    return OpenOptions(256, 4, 8, 0.001, None, "auto", None, "cpu", **more)


def slot(models, name, limit=10**9, **more):
    return _slot(ModelSource(models / name), str(models / name), limit, options(**more))


def test_drafts_are_assigned_by_the_name_of_their_model():
    assert assign_drafts(NAMES, ["other=ngram", "/models/small=a=b"]) == ["a=b", "ngram"]
    assert assign_drafts(NAMES[:1], ["ngram"]) == assign_drafts(NAMES[:1], ["small=ngram"]) == ["ngram"]
    for given, message in (
        (["ngram"], r"--draft ngram: give MODEL=DRAFT with a served model \(small, other\)"),
        (["third=ngram"], "--draft third=ngram: give MODEL=DRAFT"),
        (["small="], "give MODEL=DRAFT"),
        (["small=a", "small=b"], "--draft small=b: the model already has the draft a"),
    ):
        with pytest.raises(ConfigError, match=message):
            assign_drafts(NAMES, given)
    with pytest.raises(ConfigError, match="there is none"):
        assign_drafts([], ["ngram"])


def test_adapters_are_assigned_by_their_base_or_by_the_name_of_their_model(models):
    sources = [ModelSource(models / "other"), ModelSource(models / "small")]
    names = [{"other"}, {"small"}]
    lineage = Lineage(name="tuned", stage="sft", parents={"start": checkpoint_hash(models / "small")})
    moved = save_tuned(models, "small", "moved", "/moved/away", lineage)
    support, unknown = models / "support", save_tuned(models, "small", "unknown", "hf:nobody/has-this")
    given = [f"a={support}", f"b={moved}", f"small/c={unknown}", f"other/d={support}"]
    assert assign_adapters(sources, names, given) == [{"d": support}, {"a": support, "b": moved, "c": unknown}]
    with pytest.warns(match="moved: was trained on other weights than those of .*other"):
        assign_adapters(sources, names, [f"other/a={moved}"])
    assert assign_adapters(sources[:1], names[:1], [f"a={unknown}"]) == [{"a": unknown}]
    for given, message in (
        ([f"a={unknown}"], "its base is not a served model; serve it too, or say which of other, small"),
        ([f"small={support}"], "another model or adapter is named small"),
        ([f"a={support}", f"other/a={support}"], "another model or adapter is named a"),
        (["support"], "give NAME=FOLDER"),
        (["small/=x"], "give NAME=FOLDER"),
    ):
        with pytest.raises(ConfigError, match=message):
            assign_adapters(sources, names, given)


def test_they_answer_are_counted_and_leave_with_their_model(models):
    tuned = save_tuned(models, "small", "second")
    adapters = {"support": models / "support", "second": tuned}
    full = slot(models, "small", draft=str(models / "draft"), adapters=adapters)
    other = slot(models, "other", draft="ngram")
    pool = ModelPool([full, other], max(full.nbytes, other.nbytes))
    tokenizer = load_tokenizer(models / "small")
    with running(pool) as url, httpx.Client(base_url=url, timeout=60) as client:
        listed = client.get("/v1/models").json()["data"]
        assert [(model["id"], model["parent"]) for model in listed] == [
            ("small", None), ("other", None), ("second", "small"), ("support", "small"),
        ]  # fmt: skip

        def answer(name):
            body = {"prompt": PROMPT, "max_tokens": 8, "model": name, "temperature": 0}
            return client.post("/v1/completions", json=body).json()["choices"][0]["text"]

        for name, folder in (("support", "support"), ("second", "second"), ("small", "small")):
            request = Request(tokenizer.encode(PROMPT, bos=True), Sampling(max_tokens=8))
            (done,) = Engine(load_model(models / folder), tokenizer).run([request])
            assert answer(name) == done.text
        assert len({answer(name) for name in ("support", "second", "small")}) == 3
        draft = full.served.loop.engine.draft
        tensors = sum(tensor.nbytes for tensor in draft.model.parameters())
        cache = draft.cache.pages.limit * page_nbytes(draft.model.config, 4)
        updates = [part for each in adapters.values() for part in load_adapter_tensors(each)]
        plain = slot(models, "small").nbytes
        counted = full.nbytes - plain - sum(part.numel() * 4 for part in updates)
        assert tensors + cache <= counted < tensors + cache + page_nbytes(draft.model.config, 4)
        gone = weakref.ref(draft.model)
        del draft
        answer("other")
        gc.collect()
        assert (full.served, gone()) == (None, None)
        assert type(other.served.loop.engine.draft).__name__ == "NGramDraft"


def load_adapter_tensors(folder):
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors").values()


def test_what_does_not_fit_is_refused_before_anything_is_loaded(models):
    with pytest.raises(EngineError, match=r"--draft .*foreign: its tokenizer differs"):
        slot(models, "small", draft=str(models / "foreign"))
    with pytest.raises(ConfigError, match=r"adapter 'a' is for a .* of another size"):
        slot(models, "other", adapters={"a": models / "support"})
    needed = slot(models, "small").nbytes
    slot(models, "small", needed)
    with pytest.raises(ConfigError, match="do not fit"):
        slot(models, "small", needed, draft=str(models / "draft"))
    served = [str(models / "small"), str(models / "other")]
    for more in (
        {"draft": ["ngram"]},
        {"draft": [f"small={models / 'foreign'}"]},
        {"adapter": [f"other/a={models / 'support'}"]},
        {"adapter": [f"a={models / 'nowhere'}"]},
    ):
        with pytest.raises(HerdError) as error:
            serve_command(served, port=0, keys=False, memory_gb=1, cache_gb=0.001, **more)
        assert "\n" not in str(error.value)
