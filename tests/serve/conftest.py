"""A store in a temporary folder, and keys in it."""

from __future__ import annotations

import pytest

from herd.serve.store import Store


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "keys" / "serve.db")
    yield store
    store.close()
