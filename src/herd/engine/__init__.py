"""Generate tokens: requests in, streams of tokens out. Chat, evals, synthesis and serving are built on it.

`request.py` defines requests and answers, `engine.py` batches them over the KV cache of `cache.py`,
`sampling.py` picks tokens, `logits.py` and `constraint.py` decide which tokens may be picked, `speculate.py`
verifies the tokens that a `draft.py` proposes, `generate.py` generates with one call, `chat_session.py` holds
a dialog with tools, and `loop.py` runs an engine in a thread of its own for servers. `Engine` and
`EngineLoop` are imported at their first use, so that planners can use `memory.py` without torch.
"""

from typing import TYPE_CHECKING, Any

from .constraint import Constraint
from .request import Completion, Delta, Request, Sampling, Usage

if TYPE_CHECKING:
    from .engine import Engine
    from .loop import EngineLoop, Generation

__all__ = [
    "Completion", "Constraint", "Delta", "Engine", "EngineLoop", "Generation", "Request", "Sampling", "Usage"
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "Engine":
        from .engine import Engine

        return Engine
    if name in ("EngineLoop", "Generation"):
        from . import loop

        return getattr(loop, name)
    raise AttributeError(f"module 'herd.engine' has no attribute {name!r}")
