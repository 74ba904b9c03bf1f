"""System messages that an administrator shares with everybody who has a key."""

from __future__ import annotations

import re

import sqlalchemy as sql

from ..errors import ConfigError
from .store import Store, record
from .tables import prompts

MAX_PROMPTS, MAX_CHARACTERS = 100, 50_000
_NAME = re.compile(r"[^\W_][\w .,!?()+-]{0,63}")


def read_prompts(store: Store) -> dict[str, str]:
    """Return the texts by name, in the order of the names."""
    with store.read() as connection:
        rows = connection.execute(sql.select(prompts).order_by(prompts.c.name))
        return {row.name: row.text for row in rows}


def write_prompt(store: Store, name: str, text: str, actor: str) -> dict[str, str]:
    """Store a prompt, or remove it if the text is empty, and return all. Raises ConfigError for a bad one."""
    if not _NAME.fullmatch(name):
        raise ConfigError(f"prompt {name[:80]!r}: a name has 1 to 64 letters, digits, spaces and .,!?()+-")
    if len(text) > MAX_CHARACTERS:
        raise ConfigError(f"prompt {name}: {len(text):,} characters; at most {MAX_CHARACTERS:,}")
    with store.write(durable=True) as connection:
        connection.execute(prompts.delete().where(prompts.c.name == name))
        if text:
            count = connection.execute(sql.select(sql.func.count()).select_from(prompts)).scalar_one()
            if count >= MAX_PROMPTS:
                raise ConfigError(f"prompt {name}: there are {MAX_PROMPTS} already; remove one first")
            connection.execute(prompts.insert().values(name=name, text=text))
        record(connection, actor, "share prompt" if text else "remove prompt", name)
    return read_prompts(store)
