"""Start Open WebUI, ask a question on its page in Chromium, and print the page's text when it has the answer.

    HERD_URL=… HERD_KEY=… python bench/drive_open_webui.py OPEN-WEBUI QUESTION

``OPEN-WEBUI`` is the program. It keeps its data in the current folder. The question is asked with one tool, a Python
function named ``shell`` that Open WebUI runs itself.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import httpx
from playwright.sync_api import sync_playwright

from page import CHROMIUM
from servers import free_port, process, wait_for

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
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    environment = {
        "DATA_DIR": str(Path.cwd() / "data"), "OPENAI_API_BASE_URL": os.environ["HERD_URL"],
        "OPENAI_API_KEY": os.environ["HERD_KEY"], "WEBUI_AUTH": "False", "WEBUI_SECRET_KEY": "x",
        "ENABLE_OLLAMA_API": "False", "OFFLINE_MODE": "True", "RAG_EMBEDDING_ENGINE": "openai",
        "ANONYMIZED_TELEMETRY": "False", "DO_NOT_TRACK": "True",
    }  # fmt: skip
    words = (program, "serve", "--host", "127.0.0.1", "--port", str(port))
    with process(*words, log=Path("webui.log"), **environment) as server, httpx.Client(timeout=60) as client:
        wait_for(f"{url}/health", server, START_SECONDS)
        signed_in = client.post(f"{url}/api/v1/auths/signin", json={"email": "", "password": ""})
        token = signed_in.raise_for_status().json()["token"]
        tool = {"id": "shell", "name": "Shell", "content": TOOL, "meta": {"description": "Run a command."}}
        headers = {"authorization": f"Bearer {token}"}
        client.post(f"{url}/api/v1/tools/create", json=tool, headers=headers).raise_for_status()
        print(answer_of(url, token, question))


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


if __name__ == "__main__":
    main()
