"""`herd quantize`, and GGUF through `import` and `export`: one line, JSON, the receipt in the folder."""

import json

import pytest
import torch

import herd
from herd import checkpoint, cli
from herd.llama.config import ModelConfig
from herd.llama.model import LlamaLM
from herd.text.tokenizer import Tokenizer

TEXT = "def area(r):\n    return 3 * r * r\n\nThe quick brown fox jumps over the lazy dog, again and again.\n"


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy") / "toy"
    tokenizer = Tokenizer.train([TEXT * 3], 256 + 256 + 20)
    model = LlamaLM(ModelConfig(tokenizer.vocab_size, 256, 1, 4, 2, 256, max_context=128)).init_weights(
        0, std=0.1
    )
    checkpoint.save_model(folder, model, tokenizer, lineage=checkpoint.Lineage(name="toy", stage="teacher"))
    (folder.parent / "text.txt").write_text(TEXT * 40)
    return folder


def run(*words, capsys) -> tuple[int, str, str]:
    code = cli.run([str(word) for word in words])
    done = capsys.readouterr()
    return code, done.out, done.err


@pytest.mark.parametrize(
    "words", [("quantize", "M", "--to", "q8", "--out", "M"), ("import", "M", "M"), ("export", "M", "M")]
)
def test_the_model_that_is_read_is_not_replaced(toy, capsys, words):
    before = (toy / "model.safetensors").read_bytes()
    code, _, said = run(*(toy if word == "M" else word for word in words), capsys=capsys)
    assert code == 1
    assert "contains the model that is being read" in said
    assert (toy / "model.safetensors").read_bytes() == before


@pytest.mark.filterwarnings("ignore:.*tokens are few")
@pytest.mark.parametrize(
    "words",
    [
        ["--to", "q8"],
        ["--to", "Q5_K_M"],
        ["--to", "q4k"],
        ["--to", "q4", "--gptq", "--calib", "TEXT"],
        ["--to", "Q4_0", "--calib", "TEXT"],
        ["--to", "5.2bpw", "--calib", "TEXT"],
    ],
    ids=" ".join,
)
def test_quantize(toy, tmp_path, capsys, words):
    text = toy.parent / "text.txt"
    words = [text if word == "TEXT" else word for word in words]
    code, out, err = run(
        "quantize", toy, *words, "--text", text, "--out", tmp_path / "q", "--json", capsys=capsys
    )
    assert code == 0, err
    result = json.loads(out)
    assert result["nbytes"] == (tmp_path / "q" / "model.gguf").stat().st_size
    assert 4.5 <= result["bits_per_weight"] < 9
    found = result["fidelity"]
    assert 0 < found["kl"]["value"] < found["kl"]["detail"]["p99"]
    assert 0.3 < found["top1"]["value"] <= 1
    assert found["ppl"]["value"] == pytest.approx(found["ppl"]["detail"]["parent"], rel=0.3)
    lineage = checkpoint.load_lineage(tmp_path / "q")
    assert lineage.evals["fidelity"] == found
    assert lineage.parents == {"toy": checkpoint.checkpoint_hash(toy)}
    assert lineage.recipe["gptq"] == ("--gptq" in words)
    model, tokenizer = herd.load(tmp_path / "q")
    assert herd.generate(model, tokenizer, "def area(", max_tokens=4, temperature=0) is not None


def test_the_default_place_and_text(toy, capsys):
    code, out, err = run("quantize", toy, "--to", "q8", capsys=capsys)
    assert code == 0, err
    assert "toy-q8: " in out
    assert "same most likely token" in out
    assert (toy.parent / "toy-q8" / "model.gguf").exists()


@pytest.mark.filterwarnings("ignore:.*tokens are few")
def test_importance_is_saved_and_used_again(toy, tmp_path, capsys):
    """A file of importance gives the same weights as the text that it was measured on."""
    text, saved = toy.parent / "text.txt", tmp_path / "importance.gguf"
    words = ["quantize", toy, "--to", "IQ4_XS", "--no-measure", "--json", "--out"]
    code, out, err = run(*words, tmp_path / "a", "--calib", text, "--save-imatrix", saved, capsys=capsys)
    assert code == 0, err
    first = json.loads(out)
    assert first["formats"]["matrices"] == {"IQ4_XS": 8, "Q6_K": 1}
    code, out, err = run(*words, tmp_path / "b", "--imatrix", saved, capsys=capsys)
    assert code == 0, err
    assert json.loads(out)["weights_hash"] == first["weights_hash"]
    code, out, err = run(*words, tmp_path / "c", capsys=capsys)
    assert json.loads(out)["weights_hash"] != first["weights_hash"]
    assert checkpoint.load_lineage(tmp_path / "b").recipe["imatrix"] == str(saved)


def test_gguf_out_and_in(toy, tmp_path, capsys):
    code, out, _ = run("export", toy, tmp_path / "x.gguf", "--format", "gguf", "--to", "q8_0", capsys=capsys)
    assert code == 0
    assert "x.gguf: " in out
    code, out, _ = run("import", tmp_path / "x.gguf", tmp_path / "kept", "--json", capsys=capsys)
    assert code == 0
    assert json.loads(out)["name"] == "toy"
    assert (tmp_path / "kept" / "model.gguf").read_bytes() == (tmp_path / "x.gguf").read_bytes()
    code, _, _ = run("import", tmp_path / "x.gguf", tmp_path / "plain", "--dtype", "bf16", capsys=capsys)
    assert code == 0
    assert checkpoint.load_model(tmp_path / "plain").dtype == torch.bfloat16
    code, _, _ = run("export", tmp_path / "kept", tmp_path / "y.gguf", "--format", "gguf", capsys=capsys)
    assert code == 0
    assert (tmp_path / "y.gguf").read_bytes() == (tmp_path / "x.gguf").read_bytes()


@pytest.mark.parametrize(
    "words, reason",
    [
        (["quantize", "TOY", "--to", "q3"], "format 'q3' is not known: choose F32, F16"),
        (["quantize", "TOY", "--to", "1.5bpw", "--calib", "TEXT"], "1.5 bits per weight are too few"),
        (["quantize", "TOY", "--to", "q4", "--imatrix", "no.gguf"], "no.gguf: no such file"),
        (["quantize", "TOY", "--to", "4bpw", "--imatrix", "x.gguf"], "--imatrix replaces the text"),
        (["quantize", "TOY", "--to", "q4", "--save-imatrix", "x.gguf"], "--save-imatrix writes what --calib"),
        (["quantize", "TOY", "--to", "q4", "--gptq"], "give --calib TEXT"),
        (["quantize", "TOY", "--to", "q4", "--gptq", "--calib", "no.txt"], "no.txt"),
        (["export", "TOY", "out.gguf", "--format", "onnx"], "choose hf, gguf or vllm"),
        (["export", "TOY", "out.gguf", "--format", "gguf", "--dtype", "bf16"], "use --to"),
        (["export", "TOY", "out", "--to", "q4_0"], "use --dtype"),
        (["export", "TOY", "out", "--format", "gguf"], "ends in .gguf"),
        (["import", "no.gguf", "out"], "no.gguf: no such file or folder"),
    ],
)
def test_mistakes(toy, tmp_path, capsys, monkeypatch, words, reason):
    monkeypatch.chdir(tmp_path)
    names = {"TOY": toy, "TEXT": toy.parent / "text.txt"}
    code, _, err = run(*(names.get(word, word) for word in words), capsys=capsys)
    assert code == 1
    assert reason in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_without_a_tokenizer_nothing_is_measured(toy, tmp_path, capsys):
    checkpoint.save_model(
        tmp_path / "bare",
        checkpoint.load_model(toy),
        lineage=checkpoint.Lineage(name="bare", stage="teacher"),
    )
    with pytest.warns(UserWarning, match="the loss cannot be measured"):
        code, out, err = run("quantize", tmp_path / "bare", "--to", "q4", capsys=capsys)
    assert code == 0, err
    assert "bare-q4" in out
    assert checkpoint.load_lineage(tmp_path / "bare-q4").evals == {}


def test_a_gguf_file_is_quantized_and_a_packed_one_with_a_warning(toy, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint.export_gguf(toy, "toy-f32.gguf", "f32")
    assert cli.run(["quantize", "toy-f32.gguf", "--to", "q8", "--no-measure"]) == 0
    assert "toy-f32-q8: " in capsys.readouterr().out
    child = checkpoint.load_lineage("toy-f32-q8")
    assert child.parents == {"toy-f32": checkpoint.checkpoint_hash("toy-f32.gguf")}
    with pytest.warns(UserWarning, match=r"is quantized already \(Q8_0\), and rounding twice loses more"):
        assert cli.run(["quantize", "toy-f32-q8/model.gguf", "--to", "q4", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["fidelity"]["kl"]["value"] > 0
    assert result["folder"] == "toy-f32-q8-q4"
