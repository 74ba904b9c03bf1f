"""The prompt of `herd chat` in a terminal: typed lines, and pasted texts with and without bracketed paste."""

import os
import pty
import select
import subprocess
import sys
import time

import pytest

READ = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background of a shell inherit none
from herd.cli.chat_input import marked_pastes, read_question
while True:
    try:
        print("\\nREAD", ascii(read_question("> ")), flush=True)
    except EOFError:
        break
    except KeyboardInterrupt:
        print("\\nREAD interrupted", flush=True)
    with marked_pastes():
        os.read(int(sys.argv[1]), 1)  # as long as an answer takes
"""
LINES = [f"{number}:\tthe quick brown fox" for number in range(1, 121)]
PASTED = "\n".join(LINES)
BEGIN, END, UP, CTRL_C, CTRL_D = "\x1b[200~", "\x1b[201~", "\x1b[A", "\x03", "\x04"


@pytest.fixture
def terminal():
    """Runs the prompt in a terminal and returns a function: keys -> the question that was read.

    ``meanwhile`` are keys that are pressed before the next prompt.
    """
    controller, side = pty.openpty()
    answering, answered = os.pipe()
    child = subprocess.Popen(
        [sys.executable, "-c", READ, str(answering)], stdin=side, stdout=side, stderr=side,
        start_new_session=True, pass_fds=[answering],
        preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
        env=os.environ | {"TERM": "xterm", "INPUTRC": "/dev/null", "PYTHONIOENCODING": "utf-8"},
    )  # fmt: skip
    os.close(side)
    os.close(answering)
    shown = b""

    def until(mark: bytes, again: str = "") -> bytes:
        nonlocal shown
        patience = 12
        while mark not in shown:
            if select.select([controller], [], [], 5)[0]:
                shown += os.read(controller, 65536)
                continue
            patience -= 1
            assert patience, shown[-500:]
            os.write(controller, again.encode())
        before, _, shown = shown.partition(mark)
        return before

    def ask(keys: str, meanwhile: str = "") -> str:
        until(b"> ")
        # readline shows the prompt before it waits for keys, and a signal in between is lost: then it is sent again
        time.sleep(0.3)
        os.write(controller, keys.encode())
        until(b"\nREAD ", again=CTRL_C if keys.endswith(CTRL_C) else "")
        question = until(b"\r\n").decode().strip()
        if meanwhile:
            until(b"\x1b[?2004h")  # the terminal is told to mark what is pasted
            os.write(controller, meanwhile.encode())
            for _ in meanwhile.splitlines():
                until(b"\r\n")  # their echo: they have arrived
        os.write(answered, b".")
        return question

    yield ask
    os.close(controller)
    os.close(answered)
    child.kill()
    child.wait()


def test_a_paste_is_one_question_and_one_entry_of_the_history(terminal):
    assert terminal("first\r") == ascii("first")
    assert terminal(f"{BEGIN}{PASTED}{END}\r") == ascii(PASTED)
    assert terminal(f"Look: {BEGIN}a\n\tb{END} (end)\r") == ascii("Look: a\n\tb (end)")
    assert terminal(f"{UP}{UP}{UP}\r") == ascii("first")


@pytest.mark.parametrize("end", ["\r", "\r\r"])
def test_a_paste_that_the_terminal_does_not_mark_is_one_question_too(terminal, end):
    assert terminal("/reset\r") == ascii("/reset")
    assert terminal(PASTED.replace("\n", "\r") + end) == ascii(PASTED + "\n" * (len(end) - 1))
    assert terminal("again\r") == ascii("again")


def test_ctrl_c_drops_what_was_typed_or_pasted(terminal):
    assert terminal("abc" + CTRL_C) == "interrupted"
    assert terminal("é 👩‍👧 שלום\r") == ascii("é 👩‍👧 שלום")


def test_lines_typed_during_an_answer_are_questions_of_their_own(terminal):
    assert terminal("first\r", meanwhile="second\rthird\r/quit\r") == ascii("first")
    assert [terminal("") for _ in range(3)] == [ascii("second"), ascii("third"), ascii("/quit")]
    assert terminal(PASTED.replace("\n", "\r") + "\r") == ascii(PASTED)


def test_a_text_pasted_during_an_answer_is_one_question(terminal):
    assert terminal("first\r", meanwhile=f"{BEGIN}a\n\tb{END}\rtyped\r") == ascii("first")
    assert [terminal("") for _ in range(2)] == [ascii("a\n\tb"), ascii("typed")]
