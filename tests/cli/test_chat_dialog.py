"""`herd chat` in a terminal: the banner, a dialog, its commands, and dialogs that are resumed."""

import json
import shutil

import pytest

from herd.data.dialogs import showcase_dialogs
from herd.engine import Completion, Engine

CALL = '{"type": "function", "name": "calculator", "parameters": {"expression": "6*7"}}'


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["instruct"], "The most likely token is always chosen"),
        (
            ["plain", "--temperature", 0.2, "--top-p", 0.9],
            "Tokens are drawn with temperature 0.2, top_p 0.9; --temperature 0",
        ),
        (["plain"], "context 512 tokens."),
        (["plain", "--context", 64], "context 64 tokens."),
        (["teacher"], "This is a base model: it continues your text"),
    ],
)
def test_the_banner_says_what_is_in_effect(chat, folders, scripted, args, line):
    scripted("Hello.")
    assert line in chat(folders / args[0], *args[1:], lines=["Hi"])[1]


def test_the_card_of_a_model_of_others_speaks_of_its_training_only_without_a_chat_template(
    chat, folders, scripted, tmp_path
):
    scripted("more", "more")
    model = shutil.copytree(folders / "plain", tmp_path / "plain")
    assert chat(model, lines=["Hi"])[1].splitlines()[1].startswith("Tokens are drawn with temperature 0.6")
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        (model / name).unlink(missing_ok=True)
    assert "No chat template: this is probably a base model" in chat(model, lines=["Hi"])[1]


def test_an_interactive_dialog_keeps_its_messages_until_reset(chat, folders, scripted):
    prompts = scripted("Hello!", CALL, "It is 42.", "Fresh.")
    lines = ["Hi", "", "6*7?", "/what", "/reset", "Again", "/quit", "never read"]
    code, out, _ = chat(folders / "instruct", lines=lines)
    assert code == 0
    assert "demo-instruct:" in out
    assert "stage instruct, context 512 tokens" in out
    assert "Measured on 400 held-out questions that need a tool: 88 % correct." in out
    assert "The model was just tried on 25 questions and answered 0 correctly." in out
    assert "Hello!\ncalls calculator(expression='6*7')\n  → 42\nIt is 42.\n" in out
    assert "/what is unknown." in out
    assert "Hello!" in prompts[1]
    assert "Hello!" not in prompts[3]


def test_the_suggested_questions_are_those_the_model_answers(chat, folders, scripted, monkeypatch):
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
    _, out, _ = chat(folders / "instruct", "--lang", "de", lines=["2"])
    assert "tried on 5 questions and answered 5 correctly" in out
    for number, dialog in enumerate(dialogs, 1):
        assert f"  {number}  {dialog.prompt[-1]['content']}" in out
    assert dialogs[1].prompt[-1]["content"] in prompts[0]


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
def test_a_dialog_shows_exactly_what_the_model_wrote(chat, folders, scripted, written, shown):
    scripted(written)
    _, out, _ = chat(folders / "imported", lines=["Hi"])
    assert f"\n{shown}\n" in out


def test_ctrl_c_stops_the_answer_only(chat, folders, scripted):
    prompts = scripted(("one two three", KeyboardInterrupt), "Yes.")
    code, out, _ = chat(folders / "imported", lines=[KeyboardInterrupt, "Count", "More?"])
    assert code == 0
    assert "Ctrl-D leaves." in out
    assert "one two three\nstopped\n" in out
    assert "Yes.\n" in out
    assert "one two three<|eot_id|>" in prompts[1]


def test_a_full_context_is_reported(chat, folders, scripted):
    scripted(("cut", "context"), "Hello again.")
    long = "word " * 300
    _, out, _ = chat(folders / "imported", lines=["Hi", long, "Hi"])
    assert (
        "cut\nthe context is full, so the answer was cut off; ask again, and the oldest turns make room\n"
        in out
    )
    assert "and the context has 512: ask something shorter" in out
    assert "Hello again." in out


def test_a_full_context_forgets_the_oldest_turns_with_a_warning(chat, folders, scripted):
    scripted(*["Fine. " * 12] * 8)
    _, out, _ = chat(folders / "plain", lines=["How are you? " * 3] * 8)
    assert "the context is full: the oldest" in out
    assert "forgotten (the system message stays)" in out


def test_what_begins_with_a_slash_is_a_question_unless_it_is_one_word(chat, folders, scripted):
    prompts = scripted("A path.", "A comment.")
    lines = ["/usr/bin or /bin?", "/* c */ int x;\n\ty();", "/rest", "/reset ", " /quit"]
    _, out, _ = chat(folders / "plain", lines=lines)
    assert len(prompts) == 2
    assert "/* c */ int x;\n\ty();" in prompts[1]
    assert "/rest is unknown." in out
    assert "The dialog is forgotten." in out


@pytest.mark.parametrize(
    "line", ["/ reset", "/RESET", "/reset now", "/reset?", "/quit!", "/quit please", "/", "//"]
)
def test_a_command_that_is_mistyped_is_not_a_question(chat, folders, scripted, line):
    prompts = scripted("Hello.")
    _, out, _ = chat(folders / "plain", lines=["Hi", line, "/quit"])
    assert (len(prompts), f"{line} is unknown. /reset forgets" in out) == (1, True)


def test_the_last_dialog_is_resumed(chat, folders, scripted):
    prompts = scripted("Hello, Ada.", "Ada.", "Still Ada.", "No idea.")
    assert chat(folders / "plain", "-p", "x", "--continue")[::2] == (
        1,
        f"error: --continue: no dialog with {folders / 'plain'} is stored; leave out --continue to begin a new one\n",
    )
    chat(folders / "plain", "--system", "Be brief.", lines=["I am Ada."])
    assert chat(folders / "plain", "-p", "Who am I?", "--continue")[1] == "Ada.\n"
    assert "Be brief." in prompts[1]
    assert prompts[1].index("I am Ada.") < prompts[1].index("Hello, Ada.") < prompts[1].index("Who am I?")
    out = chat(folders / "plain", "--continue", lines=["Sure?", "/reset"])[1]
    assert "> I am Ada." in out
    assert "Hello, Ada." in out
    assert "Still Ada." in out
    assert chat(folders / "plain", "-p", "x", "--continue")[0] == 1  # /reset has forgotten it
    assert chat(folders / "imported", "-p", "x", "--continue")[0] == 1  # another model's dialogs are others


def test_a_resumed_dialog_is_shown_as_it_was(chat, folders, scripted):
    scripted("\tone\n" + "word " * 100 + "\n  two", "x")
    chat(folders / "plain", lines=["\tTab?\n\nlast line"])
    out = chat(folders / "plain", "--continue", lines=["more"])[1]
    assert "> \tTab?\n\nlast line\n\tone\n" + "word " * 100 + "\n  two\n" in out


def test_text_completion_has_no_dialog_to_resume(chat, folders):
    for args in ((folders / "teacher",), (folders / "plain", "--complete")):
        code, _, err = chat(*args, "-p", "x", "--continue")
        assert (code, err) == (
            1,
            "error: --continue is for dialogs; a base model and --complete continue text\n",
        )
