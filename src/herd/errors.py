"""Define the errors that users can cause. Each is a single line that names the thing, the value and the cure.

The command line prints ``str(error)`` and exits with ``error.exit_code``. Tracebacks are shown only for bugs.
"""

from __future__ import annotations


class HerdError(Exception):
    """Base class of all errors whose cause is the input or the machine, not the code."""

    exit_code = 1


class ConfigError(HerdError):
    """A model configuration that cannot exist, e.g. ``n_heads=12 is not a multiple of n_kv_heads=5``."""


class RecipeError(HerdError):
    """A recipe with an unknown key, a wrong type or an impossible combination. It names the line."""


class StorageError(HerdError):
    """A disk that is full, a path that cannot be written, or a folder that another process has locked."""


class CheckpointError(HerdError):
    """A checkpoint folder or file that is missing, truncated, corrupt or of the wrong shape."""


class QuantError(HerdError):
    """Weights that a block format cannot store: rows with an incomplete block, values that are not finite."""


class TokenizerError(HerdError):
    """A tokenizer that is missing, malformed or does not fit the model."""


class ChatError(HerdError):
    """A dialog that cannot be written, read or continued."""


class DataError(HerdError):
    """A corpus, shard or dialog file that is empty, binary, corrupt or too small."""


class TrainingError(HerdError):
    """Training that cannot continue: NaN loss, incompatible resume state, a full disk."""


class EngineError(HerdError):
    """A generation request that cannot be served, e.g. a prompt beyond the context."""


class ContextError(EngineError):
    """A prompt, or a text to score, that is longer than the context."""


class ConstraintError(EngineError):
    """A constraint that is malformed, too complex or impossible to follow. Its author can mend it."""


class EngineBusyError(EngineError):
    """A request that an engine cannot take now, because too many wait or it is closing. Try again later."""


class ToolError(HerdError):
    """A tool call that is malformed, unknown, or failed."""


class PlanError(HerdError):
    """A plan for an unknown machine, or a request that is impossible or contradicts itself."""


class ReportError(HerdError):
    """A receipt, run folder or report that is missing, malformed or cannot be written."""
