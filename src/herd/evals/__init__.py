"""Measure models: functions here return `Score`s, numbers with an interval, ready for JSON.

Benchmarks: `tasks/` and `harness.py`. Without questions: `bpb.py` (compression of held-out text),
`fidelity.py` (closeness to a teacher), `quantized.py` (to the original), `needle.py`, `tooluse.py`,
`code.py`, `samples.py`. Models decode through `herd.engine`; intervals come from `bootstrap.py`.
"""

from .bootstrap import Interval, mean_interval, paired_difference, wilson
from .score import Score

__all__ = ["Interval", "Score", "mean_interval", "paired_difference", "wilson"]
