"""What `herd chat` refuses, in one line: models, options, schemas and questions that cannot be used."""

import io
import json
import shutil

import pytest


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["mute", "-p", "x"], "has no tokenizer; put the model's"),
        (["nowhere", "-p", "x"], "no such file or folder"),
        (["nowhere"], "no such file or folder"),  # and not that stdin is empty
        (["instruct", "-p", "x", "--temperature", "-1"], "temperature=-1.0 must be at least 0"),
        (["instruct", "-p", "x", "--top-k", "-1"], "top_k=-1 must be at least 0"),
        (["instruct", "-p", "x", "--stop", ""], "stop strings must be non-empty text"),
        (
            ["instruct", "-p", "x", "--tool-call-format", "xml"],
            "--tool-call-format xml is unknown; this model's: json, builtin, function",
        ),
        (["instruct", "-p", "x", "--kv", "int8"], "a multiple of 32, not 8"),
        (["instruct", "-p", "word " * 300], "the context has 512"),
        (["instruct"], "stdin is empty"),
        (["instruct", "-p", "x", "--schema", "nowhere.json"], "--schema nowhere.json: cannot be read"),
        (
            ["instruct", "-p", "x", "--schema", "a.json", "--regex", "a"],
            "--schema and --regex exclude each other",
        ),
        (["instruct", "-p", "x", "--regex", "(a"], "unclosed group"),
        (["instruct", "-p", "x", "--draft", "mute"], "has no tokenizer"),
    ],
)
def test_bad_input_is_one_error_line(chat, folders, args, message):
    code, out, err = chat(*(folders / arg if arg in ("mute", "nowhere", "instruct") else arg for arg in args))
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [("--dtype", "int7", "'int7' is not one of fp32, bf16, fp16"), ("--kv", "int4", "'int4' is not one of")],
)
def test_unknown_number_formats_are_wrong_usage(chat, folders, option, value, message):
    code, out, err = chat(folders / "instruct", "-p", "x", option, value)
    assert (code, out) == (2, "")
    assert message in " ".join(err.replace("│", " ").split())


def test_an_unreadable_generation_config_is_an_error(chat, folders, tmp_path):
    folder = shutil.copytree(folders / "imported", tmp_path / "copy")
    (folder / "generation_config.json").write_text("[]")
    code, _, err = chat(folder, "-p", "x")
    assert code == 1
    assert "generation_config.json: holds list" in err


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "integer", "minimum": -9223372036854775817, "maximum": -9223372036854775809},
        {"const": 1234567890123456789},
        {"$defs": {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(5000)}, "$ref": "#/$defs/a0"},
    ],
    ids=["below int64", "above 2^53", "dangling chain"],
)
def test_a_schema_that_cannot_be_kept_is_refused_in_one_line(chat, folders, tmp_path, schema):
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    code, out, err = chat(folders / "instruct", "-p", "x", "--schema", tmp_path / "schema.json")
    assert (code, out) == (1, "")
    assert "the JSON schema" in err
    assert err.count("\n") == 1


def test_an_empty_question_and_binary_stdin_are_refused(chat, folders, monkeypatch):
    code, out, err = chat(folders / "instruct", "-p", "")
    assert (code, out) == (1, "")
    assert "the question is empty" in err
    assert chat(folders / "teacher", "-p", "", "--max-tokens", 3)[0] == 0  # a base model begins from nothing
    binary = io.TextIOWrapper(io.BytesIO(b"\x7fELF\xff\xfe\x00"), encoding="utf-8")
    monkeypatch.setattr(io, "StringIO", lambda _: binary)
    code, out, err = chat(folders / "instruct")
    assert (code, out, err) == (1, "", "error: stdin is not text: byte 4 is not UTF-8\n")


def test_bytes_that_are_no_text_are_refused_by_name(chat, folders):
    for args, what in (
        (("-p", "caf\udce9"), "the question"),
        (("-p", "x", "--system", "\udce9"), "--system"),
    ):
        assert chat(folders / "plain", *args) == (1, "", f"error: {what} is not UTF-8 text\n")
