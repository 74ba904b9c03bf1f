"""`herd chat`: one answer for pipes, a dialog in a terminal, one error line for bad input."""

import io
import itertools
import json
import shutil
import sys

import pytest

import herd.cli as cli
from herd.checkpoint import Lineage, save_model
from herd.cli.chat_progress import _Line
from herd.data.dialogs import make_dialogs, showcase_dialogs
from herd.data.prompts import system_prompt
from herd.engine import Completion, Delta, Engine
from herd.llama import ModelConfig
from herd.llama.model import LlamaLM
from herd.text.tokenizer import Tokenizer

CALL = '{"type": "function", "name": "calculator", "parameters": {"expression": "6*7"}}'


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([d.messages[-1]["content"] for d in make_dialogs(200, 0, languages=("en",))], 640)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer):
    """Small random models of every kind of lineage."""
    root = tmp_path_factory.mktemp("run")
    config = ModelConfig(640, 32, 2, 4, 2, 48, rope_theta=10_000.0, max_context=512)
    model = LlamaLM(config).init_weights(0, std=0.2)
    for stage in ("teacher", "instruct", "imported"):
        save_model(root / stage, model, tokenizer, lineage=Lineage(name=f"demo-{stage}", stage=stage))
    save_model(root / "plain", model, tokenizer)
    save_model(root / "mute", model)
    scores = [{"model": "instruct", "name": "tool_use", "value": 0.875, "n": 400}]
    (root / "scores.json").write_text(json.dumps(scores))
    return root


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Runs a command line and gives (exit code, stdout, stderr)."""

    monkeypatch.setattr("herd.cli.chat_store.cache_folder", lambda: tmp_path / "cache")

    def go(*args, stdin=None, lines=None):
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin or ""))
        if lines is not None:
            left = iter(lines)

            def read(prompt=""):
                line = next(left, EOFError)
                if isinstance(line, type):
                    raise line
                return line

            monkeypatch.setattr("builtins.input", read)
            monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
            monkeypatch.setenv("COLUMNS", "300")
        code = cli.run(["chat", *map(str, args)])
        out = capsys.readouterr()
        return code, out.out, out.err

    return go


@pytest.fixture
def scripted(monkeypatch):
    """Replaces decoding by given answers, in turn, and keeps the prompts."""

    def install(*answers):
        left, prompts = iter(answers), []

        class Scripted:
            def __init__(self, answer):
                text, self.reason = answer if isinstance(answer, tuple) else (answer, "stop")
                self.pieces = [text[i : i + 7] for i in range(0, len(text), 7)]

            def __iter__(self):
                for piece in self.pieces:
                    yield Delta(piece, (1,))
                if isinstance(self.reason, type):
                    raise self.reason
                yield Delta("", (), self.reason)

            def cancel(self):
                pass

        def submit(self, request):
            prompts.append(self.tokenizer.decode(request.prompt_ids))
            return Scripted(next(left))

        monkeypatch.setattr(Engine, "submit", submit)
        monkeypatch.setattr(Engine, "run", lambda self, rs: [Completion([], "no", "stop") for _ in rs])
        return prompts

    return install


def test_one_question_prints_one_answer_to_stdout(run, folders):
    code, out, err = run(folders / "instruct", "-p", "Hello", "--max-tokens", 5)
    assert code == 0
    assert out.endswith("\n")
    assert err == "warning: the answer was cut off at --max-tokens\n"
    assert run(folders / "instruct", "-p", "-", "--max-tokens", 5, stdin="Hello\n")[1] == out
    assert run(folders / "instruct", "--max-tokens", 5, stdin="Hello\n")[1] == out


def test_sampling_options_change_the_answer(run, folders):
    ask = [folders / "instruct", "-p", "Hello", "--max-tokens", 60]
    # long enough that the answer repeats a token, so that penalties have something to act on
    greedy = run(*ask, "--temperature", 0)[1]
    hot = [*ask, "--temperature", 5, "--seed", 1]
    assert run(*hot)[1] == run(*hot)[1] != greedy
    for narrowed in (["--top-k", 1], ["--min-p", 1]):
        assert run(*hot, *narrowed)[1] == greedy
    for bent in (["--presence-penalty", 2], ["--frequency-penalty", 2], ["--repetition-penalty", 9]):
        assert run(*ask, "--temperature", 0, *bent)[1] != greedy
    stop = greedy.strip()[3:5]
    assert (
        run(*ask, "--temperature", 0, "--stop", "never said", "--stop", stop)[1]
        == greedy.split(stop)[0] + "\n"
    )


LOOP = "round and round " * 200
STOPPED = "the answer went on repeating itself, so it was stopped; --max-repeats 0 lets it go on"


def test_an_answer_that_repeats_itself_is_stopped_and_a_line_says_so(run, folders, scripted):
    ask = [folders / "instruct", "-p", "x"]
    scripted(LOOP, LOOP, LOOP, LOOP)
    code, out, err = run(*ask)
    assert (code, err) == (0, f"warning: {STOPPED}\n")
    assert LOOP.startswith(out.rstrip("\n"))
    assert len(out) < len(LOOP) / 2
    code, record, err = run(*ask, "--json")
    assert (code, err) == (0, f"warning: {STOPPED}\n")
    assert json.loads(record)["finish_reason"] == "repetition"
    assert run(*ask, "--max-repeats", 0)[1:] == (LOOP + "\n", "")
    code, out, _ = run(folders / "plain", lines=["Hello"])
    assert STOPPED in out


def test_the_banner_says_how_tokens_are_chosen(run, folders, scripted):
    scripted("Hello.", "Hello.")
    assert "The most likely token is always chosen" in run(folders / "instruct", lines=["Hi"])[1]
    out = run(folders / "plain", "--temperature", 0.2, "--top-p", 0.9, lines=["Hi"])[1]
    assert "Tokens are drawn with temperature 0.2, top_p 0.9; --temperature 0" in out


def test_the_banner_names_the_context_in_effect(run, folders, scripted):
    scripted("Hello.", "Hello.")
    assert "context 512 tokens." in run(folders / "plain", lines=["Hi"])[1]
    assert "context 64 tokens." in run(folders / "plain", "--context", 64, lines=["Hi"])[1]


@pytest.fixture
def outputs(monkeypatch):
    """Makes the outputs terminals, and every look at the clock of the progress take ``seconds``."""

    def install(seconds, is_terminal=True):
        times = itertools.count(0, seconds)
        monkeypatch.setattr("herd.cli.chat_progress.monotonic", lambda: next(times))
        monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)

    return install


def test_a_line_shows_how_much_of_a_long_prompt_is_read_until_the_answer_begins(
    run, folders, tokenizer, outputs
):
    ask = [folders / "teacher", "-p", "one two three", "--temperature", 0, "--max-tokens", 1, "--json"]
    outputs(0.1)
    _, answer, err = run(*ask)
    assert err == ""
    outputs(0.6)
    n_tokens = len(tokenizer.encode("one two three", bos=True))
    line = f"reading the prompt: {100 * (n_tokens // 2) // n_tokens} % of {n_tokens} tokens"
    assert run(*ask)[1:] == (answer, f"{line}\r{' ' * len(line)}\r")  # after the first of two layers
    outputs(0.6, is_terminal=False)
    assert run(*ask)[1:] == (answer, "")


def test_ctrl_c_erases_the_progress_of_a_prompt(run, folders, outputs, monkeypatch):
    def stop(self, n_read, n_tokens):
        update(self, n_read, n_tokens)
        if n_read:
            raise KeyboardInterrupt

    update = _Line.update
    monkeypatch.setattr(_Line, "update", stop)
    outputs(0.6)
    code, _, err = run(folders / "teacher", "-p", "one two three")
    line, blank, rest = err.split("\r")
    assert (code, blank, rest) == (130, " " * len(line), "\nstopped\n")


def test_a_tool_is_run_and_its_result_goes_to_stderr(run, folders, scripted):
    prompts = scripted(CALL, "It is 42.")
    code, out, err = run(folders / "instruct", "-p", "6*7?")
    assert (code, out, err) == (0, "It is 42.\n", "calculator(expression='6*7') → 42\n")
    assert system_prompt("json") in prompts[0]
    assert "ipython<|end_header_id|>\n\n42<|eot_id|>" in prompts[1]


def test_json_holds_the_text_the_calls_and_the_reason(run, folders, scripted):
    scripted(CALL, "It is 42.")
    code, out, _ = run(folders / "instruct", "-p", "6*7?", "--json")
    call = {"name": "calculator", "arguments": {"expression": "6*7"}, "result": "42"}
    assert code == 0
    assert json.loads(out) == {"text": "It is 42.", "calls": [call], "finish_reason": "stop", "n_tokens": 14}


@pytest.mark.parametrize(
    "answer",
    [
        '{"name": "Alice", "parameters": {"role": "admin"}}',
        '{"name": "Bob", "arguments": {"role": null}}',
        '{"type": "function", "name": "x", "parameters": {}}',
        '{"function": {"name": "y", "arguments": "{}"}}',
        '[{"name": "Alice", "parameters": {}}, {"name": "Bob", "parameters": {}}]',
        '{\n  "name": "Alice",\n  "parameters": {\n    "role": "admin"\n  }\n}',
        'The record is {"name": "Alice", "parameters": {"role": "admin"}}.',
        "<function=area>{}</function>",
        "subprocess.call(args=1)",
        "<|python_tag|>x = 1",
        '```json\n{"name": "Alice", "parameters": {}}\n```',
    ],
)
def test_without_tools_json_and_code_are_answers(run, folders, scripted, answer):
    scripted(answer, answer)
    assert run(folders / "imported", "-p", "Which?") == (0, answer + "\n", "")
    _, out, _ = run(folders / "plain", "-p", "Which?", "--json")
    assert (json.loads(out)["text"], json.loads(out)["calls"]) == (answer, [])


def test_a_call_that_was_cut_off_before_it_ran_is_shown(run, folders, scripted):
    scripted((CALL, "length"), (CALL, "length"))
    _, out, err = run(folders / "instruct", "-p", "6*7?")
    assert out == "\n"
    assert "calculator(expression='6*7') was not run\n" in err
    _, out, _ = run(folders / "instruct", "-p", "6*7?", "--json")
    call = {"name": "calculator", "arguments": {"expression": "6*7"}, "result": None}
    assert json.loads(out)["calls"] == [call]


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("ratio 1:100:2", "ratio 1:100:2"),
        (":key: :smile: :100:", ":key: :smile: :100:"),
        ("a\tb\t\tc", "a\tb\t\tc"),
        ("[bold]x[/bold] [red]", "[bold]x[/bold] [red]"),
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("over\rwritten", "over\\x0dwritten"),
        ("back\x08space \x00 \x7f", "back\\x08space \\x00 \\x7f"),
        ("\x9b31m C1 \x85", "\\x9b31m C1 \\x85"),
        ("trailing spaces   \n\n  indented", "trailing spaces   \n\n  indented"),
        ("word " * 100, "word " * 100),
        ("Größe 🔑 日本", "Größe 🔑 日本"),
    ],
)
def test_a_dialog_shows_exactly_what_the_model_wrote(run, folders, scripted, written, shown):
    scripted(written)
    _, out, _ = run(folders / "imported", lines=["Hi"])
    assert f"\n{shown}\n" in out


def test_escape_sequences_are_spelled_out_on_a_terminal_and_kept_in_pipes(
    run, folders, scripted, monkeypatch
):
    scripted("\x1b[2J:key:\t", "\x1b[2J:key:\t")
    assert run(folders / "imported", "-p", "x")[1] == "\x1b[2J:key:\t\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert run(folders / "imported", "-p", "x")[1] == "\\x1b[2J:key:\t\n"


def test_base_models_continue_text(run, folders, scripted):
    prompts = scripted("width):", "more")
    assert run(folders / "teacher", "-p", "def area(")[1] == "width):\n"
    assert prompts == ["<|begin_of_text|>def area("]
    assert run(folders / "plain", "-p", "def area(", "--complete")[1] == "more\n"
    assert prompts[1] == prompts[0]


def test_models_from_elsewhere_get_no_system_message_unless_asked(run, folders, scripted):
    prompts = scripted("Hi.", "Hi.", CALL)
    assert run(folders / "imported", "-p", "Hello")[1] == "Hi.\n"
    assert "system" not in prompts[0]
    run(folders / "plain", "-p", "Hello", "--system", "Be kind.")
    assert "Be kind." in prompts[1]
    code, out, err = run(folders / "imported", "-p", "6*7?")
    assert (code, out, err) == (0, CALL + "\n", "")  # without tools it is no call


def test_an_interactive_dialog_keeps_its_messages_until_reset(run, folders, scripted):
    prompts = scripted("Hello!", CALL, "It is 42.", "Fresh.")
    lines = ["Hi", "", "6*7?", "/what", "/reset", "Again", "/quit", "never read"]
    code, out, _ = run(folders / "instruct", lines=lines)
    assert code == 0
    assert "demo-instruct:" in out
    assert "stage instruct, context 512 tokens" in out
    assert "Measured on 400 held-out questions that need a tool: 88 % correct." in out
    assert "The model was just tried on 25 questions and answered 0 correctly." in out
    assert "Hello!\ncalls calculator(expression='6*7')\n  → 42\nIt is 42.\n" in out
    assert "/what is unknown." in out
    assert "Hello!" in prompts[1]
    assert "Hello!" not in prompts[3]


def test_the_suggested_questions_are_those_the_model_answers(run, folders, scripted, monkeypatch):
    prompts = scripted("Sure.")
    dialogs = showcase_dialogs("de")

    def answer(self, requests):
        """Right about everything in the showcase: a call first where one is needed."""
        out = []
        for request in requests:
            text = self.tokenizer.decode(request.prompt_ids)
            said = "no"
            for d in dialogs:
                if d.prompt[-1]["content"] in text:
                    call = d.call and json.dumps({"name": d.call["name"], "parameters": d.call["arguments"]})
                    said = (
                        call
                        if d.call and "ipython<|end_header_id|>" not in text
                        else d.messages[-1]["content"]
                    )
            out.append(Completion([], said, "stop"))
        return out

    monkeypatch.setattr(Engine, "run", answer)
    _, out, _ = run(folders / "instruct", "--lang", "de", lines=["2"])
    assert "tried on 5 questions and answered 5 correctly" in out
    for number, dialog in enumerate(dialogs, 1):
        assert f"  {number}  {dialog.prompt[-1]['content']}" in out
    assert dialogs[1].prompt[-1]["content"] in prompts[0]


def test_ctrl_c_stops_the_answer_only(run, folders, scripted):
    prompts = scripted(("one two three", KeyboardInterrupt), "Yes.")
    code, out, _ = run(folders / "imported", lines=[KeyboardInterrupt, "Count", "More?"])
    assert code == 0
    assert "Ctrl-D leaves." in out
    assert "one two three\nstopped\n" in out
    assert "Yes.\n" in out
    assert "one two three<|eot_id|>" in prompts[1]


def test_a_full_context_is_reported(run, folders, scripted):
    scripted(("cut", "context"), "Hello again.")
    long = "word " * 300
    _, out, _ = run(folders / "imported", lines=["Hi", long, "Hi"])
    assert (
        "cut\nthe context is full, so the answer was cut off; ask again, and the oldest turns make room\n"
        in out
    )
    assert "and the context has 512: ask something shorter" in out
    assert "Hello again." in out


def test_the_card_of_a_base_model_says_that_it_continues_text(run, folders, scripted):
    scripted("more")
    _, out, _ = run(folders / "teacher", lines=["def area("])
    assert "This is a base model: it continues your text" in out


def test_the_card_of_a_model_of_others_speaks_of_its_training_only_without_a_chat_template(
    run, folders, scripted, tmp_path
):
    scripted("more", "more")
    model = shutil.copytree(folders / "plain", tmp_path / "plain")
    assert run(model, lines=["Hi"])[1].splitlines()[1].startswith("Tokens are drawn with temperature 0.6")
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        (model / name).unlink(missing_ok=True)
    assert "No chat template: this is probably a base model" in run(model, lines=["Hi"])[1]


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
    ],
)
def test_bad_input_is_one_error_line(run, folders, args, message):
    code, out, err = run(folders / args[0], *args[1:])
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [("--dtype", "int7", "'int7' is not one of fp32, bf16, fp16"), ("--kv", "int4", "'int4' is not one of")],
)
def test_unknown_number_formats_are_wrong_usage(run, folders, option, value, message):
    code, out, err = run(folders / "instruct", "-p", "x", option, value)
    assert (code, out) == (2, "")
    assert message in " ".join(err.replace("│", " ").split())


def test_an_unreadable_generation_config_is_an_error(run, folders, tmp_path):
    import shutil

    folder = shutil.copytree(folders / "imported", tmp_path / "copy")
    (folder / "generation_config.json").write_text("[]")
    code, _, err = run(folder, "-p", "x")
    assert code == 1
    assert "generation_config.json: holds list" in err


def test_answers_satisfy_a_schema_or_match_a_regex(run, folders, tmp_path):
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 2}')
    code, out, err = run(folders / "instruct", "-p", "Which?", "--schema", schema)
    assert (code, err) == (0, "")
    assert [type(x) for x in json.loads(out)] == [bool, bool]
    assert run(folders / "teacher", "-p", "1 + 1 =", "--regex", "[0-9]{3}")[1].strip().isdecimal()
    same, out, _ = run(folders / "instruct", "-p", "Which?", "--schema", schema, "--draft", "ngram", "--json")
    assert same == 0
    assert set(json.loads(out)["speculated"]) == {"drafted", "verified", "accepted"}


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "integer", "minimum": -9223372036854775817, "maximum": -9223372036854775809},
        {"const": 1234567890123456789},
        {"$defs": {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(5000)}, "$ref": "#/$defs/a0"},
    ],
    ids=["below int64", "above 2^53", "dangling chain"],
)
def test_a_schema_that_cannot_be_kept_is_refused_in_one_line(run, folders, tmp_path, schema):
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    code, out, err = run(folders / "instruct", "-p", "x", "--schema", tmp_path / "schema.json")
    assert (code, out) == (1, "")
    assert "the JSON schema" in err
    assert err.count("\n") == 1


def test_a_draft_model_does_not_change_the_answer(run, folders):
    plain = run(folders / "instruct", "-p", "Hello", "--max-tokens", 12)
    assert (
        run(folders / "instruct", "-p", "Hello", "--max-tokens", 12, "--draft", folders / "imported") == plain
    )


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--schema", "nowhere.json"], "--schema nowhere.json: cannot be read"),
        (["--schema", "schema.json", "--regex", "a"], "--schema and --regex exclude each other"),
        (["--regex", "(a"], "unclosed group"),
        (["--draft", "mute"], "--draft"),
    ],
)
def test_impossible_constraints_are_one_error_line(run, folders, args, message):
    args = [folders / a if a == "mute" else a for a in args]
    code, out, err = run(folders / "instruct", "-p", "x", *args)
    assert (code, out) == (1, "")
    assert message in err or "has no tokenizer" in err
    assert err.count("\n") == 1


def test_an_empty_question_and_binary_stdin_are_refused(run, folders, monkeypatch):
    code, out, err = run(folders / "instruct", "-p", "")
    assert (code, out) == (1, "")
    assert "the question is empty" in err
    assert run(folders / "teacher", "-p", "", "--max-tokens", 3)[0] == 0  # a base model begins from nothing
    binary = io.TextIOWrapper(io.BytesIO(b"\x7fELF\xff\xfe\x00"), encoding="utf-8")
    monkeypatch.setattr(io, "StringIO", lambda _: binary)
    code, out, err = run(folders / "instruct")
    assert (code, out, err) == (1, "", "error: stdin is not text: byte 4 is not UTF-8\n")


def test_bytes_that_are_no_text_are_refused_by_name(run, folders):
    for args, what in (
        (("-p", "caf\udce9"), "the question"),
        (("-p", "x", "--system", "\udce9"), "--system"),
    ):
        assert run(folders / "plain", *args) == (1, "", f"error: {what} is not UTF-8 text\n")


def test_white_space_around_a_piped_question_is_kept(run, folders, scripted):
    prompts = scripted("Fine.")
    run(folders / "plain", stdin="    if x:\n\ty()\n\n")
    assert "\n\n    if x:\n\ty()<|eot_id|>" in prompts[0]


def test_what_begins_with_a_slash_is_a_question_unless_it_is_one_word(run, folders, scripted):
    prompts = scripted("A path.", "A comment.")
    lines = ["/usr/bin or /bin?", "/* c */ int x;\n\ty();", "/rest", "/reset ", " /quit"]
    _, out, _ = run(folders / "plain", lines=lines)
    assert len(prompts) == 2
    assert "/* c */ int x;\n\ty();" in prompts[1]
    assert "/rest is unknown." in out
    assert "The dialog is forgotten." in out


@pytest.mark.parametrize(
    "line", ["/ reset", "/RESET", "/reset now", "/reset?", "/quit!", "/quit please", "/", "//"]
)
def test_a_command_that_is_mistyped_is_not_a_question(run, folders, scripted, line):
    prompts = scripted("Hello.")
    _, out, _ = run(folders / "plain", lines=["Hi", line, "/quit"])
    assert (len(prompts), f"{line} is unknown. /reset forgets" in out) == (1, True)


def test_a_resumed_dialog_is_shown_as_it_was(run, folders, scripted):
    scripted("\tone\n" + "word " * 100 + "\n  two", "x")
    run(folders / "plain", lines=["\tTab?\n\nlast line"])
    out = run(folders / "plain", "--continue", lines=["more"])[1]
    assert "> \tTab?\n\nlast line\n\tone\n" + "word " * 100 + "\n  two\n" in out


def test_ctrl_c_ends_the_line_and_leaves(run, folders, scripted):
    scripted(("one two", KeyboardInterrupt))
    code, out, err = run(folders / "instruct", "-p", "Count")
    assert (code, out, err) == (130, "one two", "\nstopped\n")


def test_the_last_dialog_is_resumed(run, folders, scripted):
    prompts = scripted("Hello, Ada.", "Ada.", "Still Ada.", "No idea.")
    assert run(folders / "plain", "-p", "x", "--continue")[::2] == (
        1,
        f"error: --continue: no dialog with {folders / 'plain'} is stored; leave out --continue to begin a new one\n",
    )
    run(folders / "plain", "--system", "Be brief.", lines=["I am Ada."])
    assert run(folders / "plain", "-p", "Who am I?", "--continue")[1] == "Ada.\n"
    assert "Be brief." in prompts[1]
    assert prompts[1].index("I am Ada.") < prompts[1].index("Hello, Ada.") < prompts[1].index("Who am I?")
    out = run(folders / "plain", "--continue", lines=["Sure?", "/reset"])[1]
    assert "> I am Ada." in out
    assert "Hello, Ada." in out
    assert "Still Ada." in out
    assert run(folders / "plain", "-p", "x", "--continue")[0] == 1  # /reset has forgotten it
    assert run(folders / "imported", "-p", "x", "--continue")[0] == 1  # another model's dialogs are others


def test_text_completion_has_no_dialog_to_resume(run, folders):
    for args in ((folders / "teacher",), (folders / "plain", "--complete")):
        code, _, err = run(*args, "-p", "x", "--continue")
        assert (code, err) == (
            1,
            "error: --continue is for dialogs; a base model and --complete continue text\n",
        )


def test_a_full_context_forgets_the_oldest_turns_with_a_warning(run, folders, scripted):
    scripted(*["Fine. " * 12] * 8)
    _, out, _ = run(folders / "plain", lines=["How are you? " * 3] * 8)
    assert "the context is full: the oldest" in out
    assert "forgotten (the system message stays)" in out
