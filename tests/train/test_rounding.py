"""Recipes with ``rounding``: the weights are trained as a block format stores them, and written in it."""

import pytest
import torch

from herd.checkpoint import load_model, open_source, quantize_folder, save_model
from herd.checkpoint.gguf_folder import GGUFSource
from herd.data.shards import Shards
from herd.data.stream import TokenStream
from herd.errors import QuantError, RecipeError, TrainingError
from herd.llama import ModelConfig
from herd.llama.model import LlamaLM
from herd.quant.mixtures import named_scheme
from herd.text import Tokenizer
from herd.train import AdamW, Cosine, TrainConfig, distil, train
from herd.train.objectives import lm
from herd.train.recipe import check_recipe, parse_recipe
from herd.train.rounding import RoundingSection
from herd.train.run import run_recipe

WORDS = (
    "apple banana cherry dragon elephant forest garden harbour island jungle kettle lemon mountain"
).split()
CONFIG = ModelConfig(560, 64, 2, 4, 2, 128, max_context=256, tie_embeddings=True)
TEXT = "\n".join(
    f"{WORDS[n % 13]} {WORDS[n * n % 13]} line {n} says that {n * n} is the square of {n}" for n in range(400)
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model that knows the text a little, the text, and its shards."""
    folder = tmp_path_factory.mktemp("rounding")
    (folder / "text.txt").write_text(TEXT)
    tokenizer = Tokenizer.train([TEXT], 560)
    shards = Shards.write(folder / "shards", [TEXT], tokenizer)
    model = LlamaLM(CONFIG).init_weights(0, 0.1)
    config = TrainConfig(steps=60, batch_size=8, context=32, optimizer=AdamW(lr=5e-3))
    train(model, TokenStream(shards, 32, 0), lm, config, folder / "first")
    save_model(folder / "model", model, tokenizer, dtype=torch.float32)
    return folder


def recipe(base, name, to="q4", more=""):
    return parse_recipe(f"""\
name: {name}
model: {{start: "{base}/model"}}
rounding: {{to: {to}}}
data: {{kind: text, paths: ["{base}/text.txt"], heldout_rows: 2}}
objective: {{kind: distil, teacher: "{base}/model"}}
optimizer: {{kind: adamw, lr: 1e-3, weight_decay: 0.0}}
train: {{steps: 12, batch_size: 4, context: 32, save_every: 4, eval_every: 6}}
out: {base}/{name}
{more}""")


def test_the_written_file_decodes_to_the_weights_that_were_trained(base):
    logged: list[dict[str, float]] = []
    used: dict[str, torch.Tensor] = {}
    models: list[LlamaLM] = []

    def see(scores: dict[str, float]) -> None:  # called while the weights are rounded
        logged.append(scores)
        used.update({name: param.detach().clone() for name, param in models[0].named_parameters()})

    folder, _ = run_recipe(recipe(base, "exact"), on_begin=lambda m, _: models.append(m), on_evaluate=see)
    assert len(logged) == 2
    source = GGUFSource(folder / "model.gguf")
    for name, _ in CONFIG.param_shapes():
        assert torch.equal(source.weight(name, torch.float32), used[name]), name
    assert source.formats["model.layers.0.mlp.up_proj.weight"].name == "Q4_0"
    assert source.formats["model.embed_tokens.weight"].name == "Q8_0"


def test_training_with_rounding_is_closer_to_the_teacher_than_plain_rounding(base, tmp_path):
    """The divergence from the teacher on other rows is at most half of that of plain rounding."""
    teacher = load_model(base / "model")
    rows = TokenStream(Shards.open(base / "shards"), 32, 7)
    student = LlamaLM(CONFIG)
    student.load_state_dict(teacher.state_dict())
    rounding = RoundingSection(to="q4").build(student)
    quantize_folder(open_source(str(base / "model")), tmp_path / "plain", named_scheme("q4", CONFIG))

    def kl(model: LlamaLM) -> float:
        tokens = rows.batch(2000, 32).tokens_BT
        with torch.inference_mode():
            log_p, log_q = (m.logits(tokens).log_softmax(-1) for m in (teacher, model))
        return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())

    plain = kl(load_model(tmp_path / "plain"))
    config = TrainConfig(
        steps=80, batch_size=8, context=32, optimizer=AdamW(lr=1e-3, weight_decay=0.0), schedule=Cosine()
    )
    train(student, rows, distil(teacher), config, tmp_path / "run", rounding=rounding)
    with rounding.applied():
        trained = kl(student)
    assert trained < 0.5 * plain


def test_an_interrupted_run_writes_the_same_file(base):
    whole, _ = run_recipe(recipe(base, "whole"))

    def stop(record):
        if record["step"] == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe(base, "broken"), on_step=stop)
    again, result = run_recipe(recipe(base, "broken"))
    assert result.resumed_from == 4
    ours, theirs = GGUFSource(again / "model.gguf"), GGUFSource(whole / "model.gguf")
    for name, _ in CONFIG.param_shapes():
        assert torch.equal(ours.rows(name), theirs.rows(name)), name


def test_a_run_is_not_resumed_with_another_format(base):
    run_recipe(recipe(base, "formats"))
    with pytest.raises(TrainingError, match="rounding"):
        run_recipe(recipe(base, "formats", to="q8"))


@pytest.mark.parametrize("more, message", [
    ("adapter: {rank: 2}", "adapters are not rounded"), ("parallel: {ranks: 2}", "one process"),
])  # fmt: skip
def test_impossible_recipes_are_refused(base, more, message):
    with pytest.raises(RecipeError, match=message):
        recipe(base, "bad", more=more)


def test_unknown_formats_are_refused_before_training(base):
    with pytest.raises(QuantError, match="q77"):
        check_recipe(recipe(base, "bad", to="q77"), 1)


def test_names_are_those_of_herd_quantize():
    assert RoundingSection(to="Q4_0").scheme(CONFIG).linears.name == "Q4_0"
    assert RoundingSection(to="q4").scheme(CONFIG).linears.name == "Q4_0"
