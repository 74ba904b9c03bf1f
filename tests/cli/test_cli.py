"""The command line: quick help, one-line errors, exit codes, JSON, and nothing heavy imported before it is needed."""

import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from herd import cli
from herd.cli.common import print_json
from herd.errors import DataError
from herd.llama import SIZES

HERD = [sys.executable, "-c", "from herd.cli import main; main()"]


def herd(*words: str, **more) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*HERD, *words], capture_output=True, text=True, **more)


def test_help_lists_every_verb_and_imports_nothing_heavy():
    code = (
        "import sys\nfrom herd import cli\ncode = cli.run(['--help'])\n"
        "heavy = {'torch', 'numpy', 'transformers', 'matplotlib', 'pydantic', 'tiktoken', 'jinja2', 'rich'}\n"
        "print('heavy:', heavy & set(sys.modules) or None)\nsys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "heavy: None" in done.stdout
    for verb in cli.VERBS:
        assert f"\n  {verb} " in done.stdout
    assert "Start with: herd chat smollm2" in " ".join(done.stdout.split())
    verbs = done.stdout.partition("Commands:")[2]
    assert "..." not in verbs, "a line of help is cut"


@pytest.mark.parametrize(
    "words, completed", [("herd s", "serve shrink synth sizes"), ("herd chat --te", "--temperature")]
)
def test_a_shell_completes_verbs_and_options(words, completed):
    asked = {"_HERD_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    assert herd(env=os.environ | asked).stdout.split() == completed.split()


def test_a_missing_model_is_reported_without_importing_torch():
    code = (
        "import sys\nfrom herd import cli\ncode = cli.run(['chat', 'no-such-model', '-p', 'hi'])\n"
        "print('torch:', 'torch' in sys.modules)\nsys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "no-such-model" in done.stderr
    assert "torch: False" in done.stdout


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_exists_and_explains_itself(verb):
    command = cli.load_verb(verb)
    assert command.help, f"herd {verb} has no docstring"
    assert all(getattr(parameter, "help", None) for parameter in command.params), (
        f"herd {verb} has a bare option"
    )
    assert cli.run([verb, "--help"]) == 0


def test_version(capsys):
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("herd 0.")


def test_sizes_are_exact(capsys):
    assert cli.run(["sizes", "--json"]) == 0
    rows = {row["model"]: row for row in json.loads(capsys.readouterr().out)}
    published = {"8B": 8_030_261_248, "70B": 70_553_706_496, "405B": 405_853_388_800, "1B": 1_235_814_400,
                 "3B": 3_212_749_824}  # fmt: skip
    assert {name: row["n_params"] for name, row in rows.items()} == published
    assert rows["405B"]["bf16_bytes"] == 811_706_777_600
    assert rows["8B"]["kv_bytes_per_token"] == 131_072
    assert cli.run(["sizes"]) == 0
    table = capsys.readouterr().out
    assert all(f"{config.n_params:,}" in table for config in SIZES.values())


def test_numbers_are_not_cut_in_a_narrow_terminal():
    table = herd("sizes", env=os.environ | {"COLUMNS": "30"}).stdout
    assert "405,853,388,800" in table


@pytest.mark.parametrize(
    "words", [["no-such-verb"], ["sizes", "--no-such-option"], ["report"], ["export", "only-one"]]
)
def test_wrong_usage_is_code_2(words, capsys):
    assert cli.run(words) == 2
    assert "Error:" in capsys.readouterr().err


def test_a_typo_gets_a_suggestion(capsys):
    cli.run(["riase"])
    assert "'raise'" in capsys.readouterr().err


def test_an_error_is_one_line_and_code_1(tmp_path):
    done = herd("report", str(tmp_path / "nothing"))
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    traced = herd("report", str(tmp_path / "nothing"), env=os.environ | {"HERD_DEBUG": "1"})
    assert "Traceback" in traced.stderr


def give(monkeypatch, error: BaseException, verb: str = "sizes") -> None:
    """Make a verb raise ``error``."""

    def command() -> None:
        """Fails."""
        raise error

    module = sys.modules.setdefault("herd.cli.failing", type(sys)("herd.cli.failing"))
    module.command = command
    monkeypatch.setitem(
        cli.VERBS, verb, cli.Verb("failing", "Fails.", "command", resume=cli.VERBS[verb].resume)
    )


def test_foreseen_errors_and_their_codes(monkeypatch, capsys):
    full = OSError(28, "No space left on device", "runs/demo/x")
    for error, said in ((DataError("corpus: x is empty"), "error: corpus: x is empty\n"),
                        (full, "error: No space left on device: runs/demo/x\n")):  # fmt: skip
        give(monkeypatch, error)
        assert cli.run(["sizes"]) == 1
        assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    "bug", [ZeroDivisionError("a bug"), ModuleNotFoundError("a bug", name="herd.no_such")]
)
def test_a_bug_shows_its_traceback(monkeypatch, bug):
    give(monkeypatch, bug)
    with pytest.raises(type(bug)):
        cli.run(["sizes"])


def test_a_package_that_is_not_installed_is_named_with_the_cure(monkeypatch, capsys):
    give(monkeypatch, ModuleNotFoundError("No module named 'fastapi'", name="fastapi.concurrency"))
    assert cli.run(["sizes"]) == 1
    assert capsys.readouterr().err.endswith(
        "fastapi is not installed: run make setup, or pip install fastapi\n"
    )


@pytest.mark.parametrize(
    "verb, said",
    [("raise", "; to resume: herd raise --resume"), ("train", "; to resume: herd train"), ("sizes", "")],
)
def test_ctrl_c_says_how_to_go_on(monkeypatch, capsys, verb, said):
    give(monkeypatch, KeyboardInterrupt(), verb)
    assert cli.run([verb]) == 130
    assert capsys.readouterr().err == f"stopped{said}\n"


def test_a_warning_is_one_line_without_source(tmp_path):
    code = "import warnings; from herd import cli; cli.run = lambda a: warnings.warn('no tokenizer') or 0; cli.main([])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr == "warning: no tokenizer\n"


def test_a_closed_pipe_is_quiet():
    done = subprocess.run(
        f"{HERD[0]} -c '{HERD[2]}' sizes --json | head -c 1", shell=True, capture_output=True, text=True
    )
    assert done.stdout == "["
    assert done.stderr == ""


@pytest.mark.parametrize(
    "words, said",
    [
        (["tune", "m", "--data", "d", "--lr", "nan"], "--lr=nan: input should be a finite number"),
        (["tune", "m", "--data", "d", "--epochs", "-1"], "--epochs=-1.0: input should be greater than 0"),
        (["tune", "m", "--data", "d", "--replay-share", "2"], "--replay-share=2.0: input should be less"),
        (["tune", "m", "--data", "d", "--method", "x"], "--method='x': input should be 'auto', 'full'"),
        (["shrink", "m", "--to", "params=1M", "--lr", "inf"], "--lr=inf: input should be a finite number"),
    ],
)
def test_a_setting_that_cannot_be_is_one_line_with_its_option(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()
    assert cli.run(words) == 1
    assert capsys.readouterr().err.startswith(f"error: {said}")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_the_home_folder_is_expanded_in_paths_and_never_in_texts(monkeypatch):
    monkeypatch.setenv("HOME", "/h")
    words = "chat ~/m --schema=~/s --out ~ -p ~/x --stop=~/y a~/b ~c/d --x=a=~/b".split()
    seen = "chat /h/m --schema=/h/s --out /h -p ~/x --stop=~/y a~/b ~c/d --x=a=~/b".split()
    assert cli._expand_home(words) == seen


def test_json_has_null_for_numbers_that_are_not_finite(capsys):
    print_json({"loss": float("nan"), "rate": [1.5, float("inf")]})
    assert json.loads(capsys.readouterr().out) == {"loss": None, "rate": [1.5, None]}


def test_json_escapes_what_the_output_cannot_encode():
    code = "from herd.cli.common import print_json; print_json({'a': 'é👍'})"
    for encoding, text in (("ascii", r'"\u00e9\ud83d\udc4d"'), ("utf-8", '"é👍"')):
        environment = os.environ | {"PYTHONIOENCODING": encoding}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
        assert text in done.stdout.decode(encoding)


@pytest.mark.parametrize("name", ["a b", "../x", "", "..", "a/b", "a:b"])
def test_a_name_that_cannot_be_a_recipes_is_refused_at_once(tmp_path, capsys, name):
    assert cli.run(["raise", "--quick", "--name", name, "--runs", str(tmp_path / "runs")]) == 1
    assert f"--name {name!r} must be letters" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_closed_streams_are_no_bug():
    for closed in (">&-", "2>&-", "<&- >&- 2>&-"):
        line = f'{shlex.join([*HERD, "sizes"])} {closed}; echo "code $?" > "$OUT"'
        with tempfile.NamedTemporaryFile() as file:
            done = subprocess.run(
                ["sh", "-c", line], env=os.environ | {"OUT": file.name}, capture_output=True
            )
            assert Path(file.name).read_text() == "code 0\n", closed
        assert b"Traceback" not in done.stderr


def test_arguments_are_utf_8_in_every_locale():
    assert cli._utf8("caf\udcc3\udca9") == "café"
    assert cli._utf8("caf\udce9") == "caf\udce9"  # a file's name in Latin-1
    assert cli._utf8("café") == "café"


def test_report_writes_the_page_and_prints_where(tmp_path, capsys):
    (tmp_path / "run.json").write_text("{}")
    assert cli.run(["report", str(tmp_path)]) == 0
    assert Path(capsys.readouterr().out.strip()) == tmp_path / "report.html"
    assert cli.run(["report", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["page"] == str(tmp_path / "report.html")


def test_import_and_export_a_checkpoint(tmp_path, capsys):
    import torch

    from herd import checkpoint
    from herd.llama import ModelConfig
    from herd.llama.model import LlamaLM

    torch.manual_seed(0)
    model = LlamaLM(ModelConfig(64, 32, 2, 4, 2, 48))
    checkpoint.save_model(tmp_path / "a", model, None, lineage=checkpoint.Lineage(name="a", stage="test"))
    assert cli.run(["export", str(tmp_path / "a"), str(tmp_path / "b"), "--dtype", "bf16", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["n_params"] == model.config.n_params
    assert cli.run(["import", str(tmp_path / "b"), str(tmp_path / "c")]) == 0
    assert f"{model.config.n_params:,} parameters" in capsys.readouterr().out
    assert (
        checkpoint.checkpoint_hash(tmp_path / "b")
        == checkpoint.checkpoint_hash(tmp_path / "c")
        == made["weights_hash"]
    )
    before = sorted(path.name for path in tmp_path.iterdir())
    for words in (["--format", "onnx"], ["--dtype", "int3"]):
        assert cli.run(["export", str(tmp_path / "a"), str(tmp_path / "d"), *words]) == 1
        assert capsys.readouterr().err.startswith("error: --")
    assert cli.run(["import", str(tmp_path / "missing"), str(tmp_path / "d")]) == 1
    for words in (["import", "b", "x.gguf"], ["export", "a", "x.safetensors"],
                  ["quantize", "a", "--to", "q8", "--out", "x.GGUF"]):  # fmt: skip
        named = [str(tmp_path / word) if word in ("a", "b") or "." in word else word for word in words]
        assert cli.run(named) == 1
        assert "is the name of a file, and a folder is written" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == before
