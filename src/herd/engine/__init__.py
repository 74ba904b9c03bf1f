"""Generate tokens: requests in, streams of tokens out. Chat, evals, synthesis and serving are built on it.

`request.py` defines requests and answers, `engine.py` batches them over the KV cache of `cache.py`,
`sampling.py` picks tokens, `logits.py` and `constraint.py` decide which tokens may be picked, `speculate.py`
verifies the tokens that a `draft.py` proposes, `generate.py` generates with one call, and `chat_session.py`
holds a dialog with tools. `Engine` is imported at its first use, so that planners can call `nbytes` without
torch.
"""

from typing import TYPE_CHECKING, Any

from .constraint import Constraint
from .memory import nbytes
from .request import Completion, Delta, Request, Sampling, Speculated, TokenLogprob

if TYPE_CHECKING:
    from .engine import Engine, ResponseStream

__all__ = [
    "Completion",
    "Constraint",
    "Delta",
    "Engine",
    "Request",
    "ResponseStream",
    "Sampling",
    "Speculated",
    "TokenLogprob",
    "nbytes",
]


def __getattr__(name: str) -> Any:
    if name in ("Engine", "ResponseStream"):
        from . import engine

        return getattr(engine, name)
    raise AttributeError(f"module 'herd.engine' has no attribute {name!r}")
