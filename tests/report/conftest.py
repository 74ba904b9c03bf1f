"""The example run, importable from the tests of this folder."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def example(tmp_path):
    """A whole run folder with invented numbers."""
    from example_run import make

    return make(tmp_path / "demo")
