"""What a model is worth, measured: every function here gives `Score`s, numbers with an interval, ready for JSON.

`bpb.py` compression of held-out text; `fidelity.py` closeness to a teacher, and `quantized.py` to the original of a
quantized model; `needle.py` finding a fact by length and depth; `tooluse.py` calls and answers; `code.py` functions
that run; `samples.py` texts side by side. All decode through `herd.engine`, and all intervals come from `bootstrap.py`.
"""

from .bootstrap import Interval, mean_interval, paired_difference, wilson
from .score import Score

__all__ = ["Interval", "Score", "mean_interval", "paired_difference", "wilson"]
