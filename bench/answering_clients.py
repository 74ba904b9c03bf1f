"""Ask a server through Ollama's client and OpenAI's responses, which no suite of `serve_sdk.py` does with an answer.

Ollama's own tests ask servers of their own, and the tests of responses have no input. Every call is made whole and
streamed, greedily: both must have the same text and the same number of tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ollama
import openai

QUESTION, MOST = "six times seven", 8
Answer = tuple[str, int]
"""A text and the number of its tokens."""


def ask_for_answers(url: str, key: str) -> dict[str, str | None]:
    """Return the failure of each call, or None for those that are right."""
    client = ollama.Client(url, headers={"Authorization": f"Bearer {key}"}, timeout=120)
    responses = openai.OpenAI(base_url=f"{url}/v1", api_key=key, timeout=120).responses
    options, messages = {"num_predict": MOST, "temperature": 0}, [{"role": "user", "content": QUESTION}]

    def chat(stream: bool) -> Answer:
        answer: Any = client.chat("tiny", messages, options=options, stream=stream)
        parts = list(answer) if stream else [answer]
        return "".join(part.message.content for part in parts), parts[-1].eval_count

    def generate(stream: bool, raw: bool = False) -> Answer:
        answer: Any = client.generate("tiny", QUESTION, raw=raw, options=options, stream=stream)
        parts = list(answer) if stream else [answer]
        return "".join(part.response for part in parts), parts[-1].eval_count

    def respond(stream: bool) -> Answer:
        answer: Any = responses.create(
            model="tiny", input=QUESTION, max_output_tokens=MOST, temperature=0, stream=stream
        )
        if not stream:
            return answer.output_text, answer.usage.output_tokens
        events = list(answer)
        text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
        return text, events[-1].response.usage.output_tokens

    calls: dict[str, Callable[[bool], Answer]] = {
        "Ollama's chat": chat,
        "Ollama's generate": generate,
        "Ollama's raw generate": lambda stream: generate(stream, raw=True),
        "OpenAI's responses": respond,
    }
    failures: dict[str, str | None] = {}
    for name, call in calls.items():
        try:
            whole, streamed = call(False), call(True)
        except (openai.OpenAIError, ollama.ResponseError) as error:
            failures[name] = repr(error)
        else:
            right = whole == streamed and 0 < whole[1] <= MOST
            failures[name] = None if right else f"whole {whole!r}, streamed {streamed!r}"
    return failures
