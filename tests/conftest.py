"""Shared fixtures: one thread a worker, real data by name."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

# Examples are never timed: a busy machine is not a bug.
settings.register_profile("herd", deadline=None)
settings.load_profile("herd")

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HERD_ALL_PATHS", "1")  # every instruction set that this processor has is tested
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

DATA = Path(os.environ.get("HERD_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(scope="session")
def real_data():
    """Path of a folder of real test data by name. The test is skipped, saying which, if it is absent."""

    def find(name: str) -> Path:
        if not (DATA / name).exists():
            pytest.skip(f"needs real data {name!r}: set HERD_TEST_DATA")
        return DATA / name

    return find


def pytest_collection_modifyitems(config, items):
    if "soak" not in (config.option.markexpr or ""):
        skip = pytest.mark.skip(reason="run by `make soak`")
        for item in items:
            if "soak" in item.keywords:
                item.add_marker(skip)
