"""The six questions and answers before every item of TruthfulQA.

The paper's own primer is part of EleutherAI's lm-eval (extra ``evals``). It is read from there without an
import, so that scores can be compared with published ones. If lm-eval is not installed, six similar pairs
written for this project are used. Settings and results name the primer.
"""

from __future__ import annotations

import importlib.util
import re
from functools import lru_cache
from pathlib import Path

import yaml

from ...package_yaml import package_yaml

Pairs = tuple[tuple[str, str], ...]
_PAIR = re.compile(r"^Q: (.+)\nA: (.+)$", re.MULTILINE)


@lru_cache
def truthfulqa_primer() -> tuple[str, Pairs]:
    """Return (origin, pairs): the primer's origin, "lm-eval" or "herd", and its (question, answer) pairs."""
    lm_eval = importlib.util.find_spec("lm_eval")
    for folder in (lm_eval and lm_eval.submodule_search_locations) or ():
        path = Path(folder) / "tasks" / "truthfulqa" / "truthfulqa_mc1.yaml"
        if path.is_file():
            template = yaml.safe_load(path.read_text(encoding="utf-8"))["doc_to_text"]
            return "lm-eval", tuple(_PAIR.findall(template.split("'")[1]))[:6]
    return "herd", tuple((question, answer) for question, answer in package_yaml(__package__, "primer.yaml"))
