"""The six questions and answers that precede every item of TruthfulQA.

The paper's own primer is part of EleutherAI's lm-eval (extra ``evals``) and is read from there without
importing it, so that scores compare with published ones. Where lm-eval is not installed, six pairs of the
same form written for this project take its place. Settings and results name which primer it was.
"""

from __future__ import annotations

import importlib.util
import re
from functools import lru_cache
from pathlib import Path

import yaml

Pairs = tuple[tuple[str, str], ...]
_PAIR = re.compile(r"^Q: (.+)\nA: (.+)$", re.MULTILINE)


@lru_cache
def truthfulqa_primer() -> tuple[str, Pairs]:
    """Return whose primer it is, "lm-eval" or "herd", and its (question, answer) pairs."""
    lm_eval = importlib.util.find_spec("lm_eval")
    for folder in (lm_eval and lm_eval.submodule_search_locations) or ():
        path = Path(folder) / "tasks" / "truthfulqa" / "truthfulqa_mc1.yaml"
        if path.is_file():
            template = yaml.safe_load(path.read_text(encoding="utf-8"))["doc_to_text"]
            return "lm-eval", tuple(_PAIR.findall(template.split("'")[1]))[:6]
    own = yaml.safe_load(Path(__file__).with_name("primer.yaml").read_text(encoding="utf-8"))
    return "herd", tuple((question, answer) for question, answer in own)
