"""`import herd` is cheap, and its few names are the ones promised."""

import subprocess
import sys

import pytest

import herd


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_no_torch_until_needed():
    code = """
import sys, herd
from herd.engine import Request, Sampling, nbytes
herd.SIZES["405B"].n_params
nbytes(herd.SIZES["8B"], 1, 131072)
print([m for m in ("torch", "numpy", "transformers", "tiktoken") if m in sys.modules])
"""
    assert python(code).strip() == "[]"


def test_sizes():
    assert herd.SIZES["405B"].n_params == 405_853_388_800


def test_unknown_name():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = herd.nonsense


def test_dir_shows_lazy_names():
    assert {"load", "generate", "Tokenizer", "render", "SIZES"} <= set(dir(herd))
