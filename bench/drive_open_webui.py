"""Start Open WebUI, ask a question on its page in Chromium, and print the page's text when it has the answer.

    HERD_URL=… HERD_KEY=… python bench/drive_open_webui.py OPEN-WEBUI QUESTION

``OPEN-WEBUI`` is the program. It keeps its data in the current folder. The question is asked with one tool, a Python
function named ``shell`` that Open WebUI runs itself.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

from page import CHROMIUM

TOOL = '''
import subprocess

class Tools:
    def shell(self, command: str) -> str:
        """
        Run a command.
        :param command: The command.
        """
        return subprocess.run(command, shell=True, capture_output=True, text=True).stdout
'''
START_SECONDS, ANSWER_SECONDS = 180, 90
AFTERWARDS = 8
"""Seconds in which the program asks for a title, tags and further questions after an answer."""


def main() -> None:
    program, question = sys.argv[1:]
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    environment = {
        "DATA_DIR": str(Path.cwd() / "data"), "OPENAI_API_BASE_URL": os.environ["HERD_URL"],
        "OPENAI_API_KEY": os.environ["HERD_KEY"], "WEBUI_AUTH": "False", "WEBUI_SECRET_KEY": "x",
        "ENABLE_OLLAMA_API": "False", "OFFLINE_MODE": "True", "RAG_EMBEDDING_ENGINE": "openai",
        "ANONYMIZED_TELEMETRY": "False", "DO_NOT_TRACK": "True",
    }  # fmt: skip
    log = Path("webui.log")
    with log.open("w") as out:
        server = subprocess.Popen(
            [program, "serve", "--host", "127.0.0.1", "--port", str(port)], env=os.environ | environment,
            stdout=out, stderr=out, start_new_session=True,
        )  # fmt: skip
    try:
        wait_for(f"{url}/health", server)
        token = post(f"{url}/api/v1/auths/signin", {"email": "", "password": ""})["token"]
        tool = {"id": "shell", "name": "Shell", "content": TOOL, "meta": {"description": "Run a command."}}
        post(f"{url}/api/v1/tools/create", tool, token)
        print(answer_of(url, token, question))
    except BaseException:
        print(log.read_text()[-3000:])
        raise
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(20)


def answer_of(url: str, token: str, question: str) -> str:
    """Ask the question on the page, and return the page's text when DONE is in it."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.add_init_script(f"localStorage.token = {json.dumps(token)}")
        page.goto(f"{url}/?models=tiny&tools=shell")
        page.wait_for_selector("#chat-input")
        for _ in range(2):  # a dialog about what is new
            page.keyboard.press("Escape")
        page.click("#chat-input")
        page.keyboard.type(question)
        page.keyboard.press("Enter")
        try:
            page.wait_for_selector("text=All is DONE.", timeout=1000 * ANSWER_SECONDS)
            page.wait_for_timeout(1000 * AFTERWARDS)
        finally:
            page.screenshot(path="page.png")
            text = page.inner_text("body")
        browser.close()
    return text


def wait_for(url: str, server: subprocess.Popen[Any]) -> None:
    """Wait until a server answers."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            if server.poll() is not None or time.monotonic() > deadline:
                raise SystemExit("Open WebUI does not answer") from None
            time.sleep(0.5)


def post(url: str, body: dict[str, Any], token: str = "") -> Any:
    """Return the JSON answer to a JSON body."""
    headers = {"content-type": "application/json", "authorization": f"Bearer {token}"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)


if __name__ == "__main__":
    main()
