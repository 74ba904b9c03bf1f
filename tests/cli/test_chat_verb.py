"""`herd chat -p`: one answer for pipes, its tools, constraints and progress."""

import itertools
import json
import sys

import pytest

from herd.cli.chat_progress import _Line
from herd.data.prompts import system_prompt

CALL = '{"type": "function", "name": "calculator", "parameters": {"expression": "6*7"}}'
LOOP = "round and round " * 200
STOPPED = "the answer went on repeating itself, so it was stopped; --max-repeats 0 lets it go on"


def test_one_question_prints_one_answer_to_stdout(chat, folders):
    code, out, err = chat(folders / "instruct", "-p", "Hello", "--max-tokens", 5)
    assert code == 0
    assert out.endswith("\n")
    assert err == "warning: the answer was cut off at --max-tokens\n"
    assert chat(folders / "instruct", "-p", "-", "--max-tokens", 5, stdin="Hello\n")[1] == out
    assert chat(folders / "instruct", "--max-tokens", 5, stdin="Hello\n")[1] == out


def test_sampling_options_change_the_answer(chat, folders):
    ask = [folders / "instruct", "-p", "Hello", "--max-tokens", 60]
    # long enough that the answer repeats a token, so that penalties have something to act on
    greedy = chat(*ask, "--temperature", 0)[1]
    hot = [*ask, "--temperature", 5, "--seed", 1]
    assert chat(*hot)[1] == chat(*hot)[1] != greedy
    for narrowed in (["--top-k", 1], ["--min-p", 1]):
        assert chat(*hot, *narrowed)[1] == greedy
    for bent in (["--presence-penalty", 2], ["--frequency-penalty", 2], ["--repetition-penalty", 9]):
        assert chat(*ask, "--temperature", 0, *bent)[1] != greedy
    stop = greedy.strip()[3:5]
    assert (
        chat(*ask, "--temperature", 0, "--stop", "never said", "--stop", stop)[1]
        == greedy.split(stop)[0] + "\n"
    )


def test_an_answer_that_repeats_itself_is_stopped_and_a_line_says_so(chat, folders, scripted):
    ask = [folders / "instruct", "-p", "x"]
    scripted(LOOP, LOOP, LOOP, LOOP)
    code, out, err = chat(*ask)
    assert (code, err) == (0, f"warning: {STOPPED}\n")
    assert LOOP.startswith(out.rstrip("\n"))
    assert len(out) < len(LOOP) / 2
    code, record, err = chat(*ask, "--json")
    assert (code, err) == (0, f"warning: {STOPPED}\n")
    assert json.loads(record)["finish_reason"] == "repetition"
    assert chat(*ask, "--max-repeats", 0)[1:] == (LOOP + "\n", "")
    code, out, _ = chat(folders / "plain", lines=["Hello"])
    assert STOPPED in out


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
    chat, folders, tokenizer, outputs
):
    ask = [folders / "teacher", "-p", "one two three", "--temperature", 0, "--max-tokens", 1, "--json"]
    outputs(0.1)
    _, answer, err = chat(*ask)
    assert err == ""
    outputs(0.6)
    n_tokens = len(tokenizer.encode("one two three", bos=True))
    line = f"reading the prompt: {100 * (n_tokens // 2) // n_tokens} % of {n_tokens} tokens"
    assert chat(*ask)[1:] == (answer, f"{line}\r{' ' * len(line)}\r")  # after the first of two layers
    outputs(0.6, is_terminal=False)
    assert chat(*ask)[1:] == (answer, "")


def test_ctrl_c_erases_the_progress_of_a_prompt(chat, folders, outputs, monkeypatch):
    def stop(self, n_read, n_tokens):
        update(self, n_read, n_tokens)
        if n_read:
            raise KeyboardInterrupt

    update = _Line.update
    monkeypatch.setattr(_Line, "update", stop)
    outputs(0.6)
    code, _, err = chat(folders / "teacher", "-p", "one two three")
    line, blank, rest = err.split("\r")
    assert (code, blank, rest) == (130, " " * len(line), "\nstopped\n")


def test_a_tool_is_run_and_its_result_goes_to_stderr(chat, folders, scripted):
    prompts = scripted(CALL, "It is 42.")
    code, out, err = chat(folders / "instruct", "-p", "6*7?")
    assert (code, out, err) == (0, "It is 42.\n", "calculator(expression='6*7') → 42\n")
    assert system_prompt("json") in prompts[0]
    assert "ipython<|end_header_id|>\n\n42<|eot_id|>" in prompts[1]


def test_json_holds_the_text_the_calls_and_the_reason(chat, folders, scripted):
    scripted(CALL, "It is 42.")
    code, out, _ = chat(folders / "instruct", "-p", "6*7?", "--json")
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
def test_without_tools_json_and_code_are_answers(chat, folders, scripted, answer):
    scripted(answer, answer)
    assert chat(folders / "imported", "-p", "Which?") == (0, answer + "\n", "")
    _, out, _ = chat(folders / "plain", "-p", "Which?", "--json")
    assert (json.loads(out)["text"], json.loads(out)["calls"]) == (answer, [])


def test_a_call_that_was_cut_off_before_it_ran_is_shown(chat, folders, scripted):
    scripted((CALL, "length"), (CALL, "length"))
    _, out, err = chat(folders / "instruct", "-p", "6*7?")
    assert out == "\n"
    assert "calculator(expression='6*7') was not run\n" in err
    _, out, _ = chat(folders / "instruct", "-p", "6*7?", "--json")
    call = {"name": "calculator", "arguments": {"expression": "6*7"}, "result": None}
    assert json.loads(out)["calls"] == [call]


def test_escape_sequences_are_spelled_out_on_a_terminal_and_kept_in_pipes(
    chat, folders, scripted, monkeypatch
):
    scripted("\x1b[2J:key:\t", "\x1b[2J:key:\t")
    assert chat(folders / "imported", "-p", "x")[1] == "\x1b[2J:key:\t\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert chat(folders / "imported", "-p", "x")[1] == "\\x1b[2J:key:\t\n"


def test_base_models_continue_text(chat, folders, scripted):
    prompts = scripted("width):", "more")
    assert chat(folders / "teacher", "-p", "def area(")[1] == "width):\n"
    assert prompts == ["<|begin_of_text|>def area("]
    assert chat(folders / "plain", "-p", "def area(", "--complete")[1] == "more\n"
    assert prompts[1] == prompts[0]


def test_models_from_elsewhere_get_no_system_message_unless_asked(chat, folders, scripted):
    prompts = scripted("Hi.", "Hi.", CALL)
    assert chat(folders / "imported", "-p", "Hello")[1] == "Hi.\n"
    assert "system" not in prompts[0]
    chat(folders / "plain", "-p", "Hello", "--system", "Be kind.")
    assert "Be kind." in prompts[1]
    code, out, err = chat(folders / "imported", "-p", "6*7?")
    assert (code, out, err) == (0, CALL + "\n", "")  # without tools it is no call


def test_answers_satisfy_a_schema_or_match_a_regex(chat, folders, tmp_path):
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 2}')
    code, out, err = chat(folders / "instruct", "-p", "Which?", "--schema", schema)
    assert (code, err) == (0, "")
    assert [type(x) for x in json.loads(out)] == [bool, bool]
    assert chat(folders / "teacher", "-p", "1 + 1 =", "--regex", "[0-9]{3}")[1].strip().isdecimal()
    same, out, _ = chat(
        folders / "instruct", "-p", "Which?", "--schema", schema, "--draft", "ngram", "--json"
    )
    assert same == 0
    assert set(json.loads(out)["speculated"]) == {"drafted", "verified", "accepted"}


def test_a_draft_model_does_not_change_the_answer(chat, folders):
    plain = chat(folders / "instruct", "-p", "Hello", "--max-tokens", 12)
    assert (
        chat(folders / "instruct", "-p", "Hello", "--max-tokens", 12, "--draft", folders / "imported")
        == plain
    )


def test_white_space_around_a_piped_question_is_kept(chat, folders, scripted):
    prompts = scripted("Fine.")
    chat(folders / "plain", stdin="    if x:\n\ty()\n\n")
    assert "\n\n    if x:\n\ty()<|eot_id|>" in prompts[0]


def test_ctrl_c_ends_the_line_and_leaves(chat, folders, scripted):
    scripted(("one two", KeyboardInterrupt))
    code, out, err = chat(folders / "instruct", "-p", "Count")
    assert (code, out, err) == (130, "one two", "\nstopped\n")
