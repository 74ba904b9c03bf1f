"""Dialogs and pairs of answers from the validation set of oasst1, a tree of messages with ranked replies."""

from __future__ import annotations

import json
from typing import Any

from common import DATA
from shrinking import dialogs

__all__ = ["dialogs", "pairs"]


def pairs() -> list[dict[str, Any]]:
    """Return a pair for every message of a user with several ranked answers: the best and the worst.

    A pair has the ``prompt`` as messages from the root on, and the ``chosen`` and ``rejected`` answer.
    """
    lines = (DATA / "oasst1_en" / "en-validation.jsonl").read_text(encoding="utf-8").splitlines()
    messages = {message["message_id"]: message for message in map(json.loads, lines)}
    answers: dict[str, list[dict[str, Any]]] = {}
    for message in messages.values():
        if message["role"] == "assistant" and message["rank"] is not None:
            answers.setdefault(message["parent_id"], []).append(message)
    found = []
    for parent, ranked in answers.items():
        ranked.sort(key=lambda message: message["rank"])
        if ranked[0]["rank"] == ranked[-1]["rank"] or parent not in messages:
            continue
        prompt, here = [], messages.get(parent)
        while here is not None:
            role = {"prompter": "user", "assistant": "assistant"}[here["role"]]
            prompt.insert(0, {"role": role, "content": here["text"]})
            here = messages.get(here["parent_id"])
        chosen, rejected = (
            [{"role": "assistant", "content": one["text"]}] for one in (ranked[0], ranked[-1])
        )
        found.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return found
