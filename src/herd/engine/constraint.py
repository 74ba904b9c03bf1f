"""Constrain answers by a JSON schema, a regular expression or a grammar, token by token.

A `Constraint` is what the caller asks for; a `Guide` follows one answer through it. Before each token the
guide marks the tokens that can still lead to a valid answer, and the sampler sees no other (Willard & Louf,
arXiv 2307.09702). llguidance does the parsing: an Earley parser over lexemes that walks the vocabulary as a
trie, about 50 µs per token with 128,256 tokens.

Whatever cannot be guaranteed is refused when the request is submitted, and a guide that cannot go on raises;
an answer never continues unconstrained. `schema.py` refuses numbers that the library would change. A
constraint that is large or has a regular expression is first compiled in a child process with limits, because
the library can overflow its stack, which no Python code can catch. An answer that ends by ``max_tokens`` is
the *beginning* of a valid one: look at its finish reason.
"""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

from ..errors import EngineError
from .schema import canonical_schema

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from torch import Tensor

    from ..text.tokenizer import Tokenizer

WHITESPACE = r"[ \t\n\r]{1,40}"
"""Blanks between the tokens of JSON. They are bounded because a model in doubt would write them forever."""
MOST_TEXT = 500_000
"""Characters of a constraint; the library's own limits on a grammar come soon after."""
PLAIN_TEXT = 4_000
"""A JSON schema up to this length, without patterns, compiles in milliseconds and cannot nest deep enough to
overflow the library's stack (that takes 1,000 references on 8 MB), so it needs no child process."""
CHILD_SECONDS, CHILD_BYTES = 4, 2 << 30
"""Processor time and address space to compile a constraint in. A child takes 50 ms for an ordinary one."""


@dataclass(frozen=True)
class Constraint:
    """The form that an answer must have, from its first to its last character. Make one with `json_schema`,
    `regex` or `lark`."""

    kind: Literal["JSON schema", "regular expression", "grammar"]
    text: str

    def __post_init__(self) -> None:
        if (n := len(self.text)) > MOST_TEXT:
            raise EngineError(
                f"the {self.kind} is too big: it has {n:,} characters, and {MOST_TEXT:,} are possible"
            )
        if self.kind == "JSON schema":
            object.__setattr__(self, "text", canonical_schema(self.text))

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | bool | str) -> Constraint:
        """Return the constraint to JSON that is valid under ``schema``, with properties in its order."""
        try:
            text = schema if isinstance(schema, str) else json.dumps(schema, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise EngineError(f"the JSON schema is not valid JSON: {error}") from None
        return cls("JSON schema", text)

    @classmethod
    def regex(cls, pattern: str) -> Constraint:
        """Return the constraint to text that ``pattern`` matches as a whole (Rust's syntax)."""
        return cls("regular expression", pattern)

    @classmethod
    def lark(cls, grammar: str) -> Constraint:
        """Return the constraint to text of a grammar in llguidance's dialect of Lark, from the rule
        ``start``."""
        return cls("grammar", grammar)


class Guide:
    """The place of one answer in its constraint: a function of the answer's tokens, which are pushed and
    popped.

    Raises EngineError, naming the problem, for a constraint that is malformed, unsupported or that nothing
    satisfies.
    """

    def __init__(self, constraint: Constraint, tokenizer: Tokenizer) -> None:
        from llguidance import LLMatcher, LLParserLimits

        self._kind = constraint.kind
        self._n_vocab = tokenizer.vocab_size
        try:
            grammar = _grammar(constraint)
            if not (_is_plain(constraint) or _compiles_in_a_child(grammar)):
                raise EngineError(
                    f"the {self._kind} is too complex: compiling it takes more than {CHILD_SECONDS} s or "
                    f"{CHILD_BYTES >> 30} GiB, or crashes the grammar library; simplify it"
                )
            limits = LLParserLimits(verbose_errors=False)
            self._matcher: LLMatcher = LLMatcher(_vocabulary(tokenizer), grammar, log_level=0, limits=limits)
        except ValueError as error:
            raise EngineError(self._message(str(error))) from None
        self._check()
        for warning in self._matcher.get_grammar_warnings():
            warnings.warn(self._message(warning), stacklevel=2)
        self.allowed()  # a grammar that is well-formed and that nothing satisfies shows itself here

    @property
    def complete(self) -> bool:
        """Whether nothing more can follow."""
        return self._matcher.is_stopped()

    @property
    def failed(self) -> bool:
        """Whether the parser gave up; `allowed`, `push` and `pop` then raise."""
        return self._matcher.is_error()

    def allowed(self) -> Tensor:
        """Return which tokens may come next, (V,) bool, with the stop tokens where the answer may end."""
        import numpy as np
        import torch

        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        return torch.from_numpy(np.unpackbits(bits, count=self._n_vocab, bitorder="little")).bool()

    def push(self, tokens: Sequence[int]) -> None:
        """Append ``tokens``, each of which was allowed."""
        self._matcher.consume_tokens(list(tokens))
        self._check()

    def pop(self, n: int) -> None:
        """Take back the last ``n`` tokens."""
        self._matcher.rollback(n)
        self._check()

    def _check(self) -> None:
        if self.failed:
            raise EngineError(self._message(self._matcher.get_error()))

    def _message(self, problem: str) -> str:
        if problem.startswith("NoExtension"):
            problem = "nothing can come next that leads to an answer"
        return f"the {self._kind} cannot be followed: {' '.join(problem.split())[:300]}"


def _grammar(constraint: Constraint) -> str:
    from llguidance import LLMatcher

    if constraint.kind == "regular expression":
        return LLMatcher.grammar_from_regex(constraint.text)
    if constraint.kind == "grammar":
        return LLMatcher.grammar_from_lark(constraint.text)
    options: Any = {"whitespace_pattern": WHITESPACE, "lenient": False}
    return LLMatcher.grammar_from_json_schema(constraint.text, overrides=options)


def _is_plain(constraint: Constraint) -> bool:
    has_pattern = '"pattern' in constraint.text  # also "patternProperties"
    return constraint.kind == "JSON schema" and not has_pattern and len(constraint.text) <= PLAIN_TEXT


COMPILE = f"""
import resource, sys
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
resource.setrlimit(resource.RLIMIT_CPU, ({CHILD_SECONDS}, {CHILD_SECONDS}))
resource.setrlimit(resource.RLIMIT_AS, ({CHILD_BYTES}, {CHILD_BYTES}))
limits = LLParserLimits(verbose_errors=False)
LLMatcher(LLTokenizer("byte"), sys.stdin.read(), log_level=0, limits=limits).compute_bitmask()
"""


@lru_cache(maxsize=1000)
def _compiles_in_a_child(grammar: str) -> bool:
    """Return whether a process with limits survives compiling ``grammar``, even if it is refused."""
    command = [sys.executable, "-P", "-c", COMPILE]
    try:
        return (
            subprocess.run(command, input=grammar.encode(), capture_output=True, timeout=60).returncode == 0
        )
    except (OSError, subprocess.TimeoutExpired):
        return False


@lru_cache(maxsize=4)
def _vocabulary(tokenizer: Tokenizer) -> LLTokenizer:
    """Return the vocabulary as the parser's trie, which takes half a second for 128,256 tokens."""
    from llguidance import LLTokenizer, TokenizerWrapper

    return LLTokenizer(
        TokenizerWrapper(_Tokens(tokenizer)),
        n_vocab=tokenizer.vocab_size,
        eos_token=sorted(tokenizer.stop_ids),
    )


class _Tokens:
    """A tokenizer as llguidance wants it. Special tokens are named, so text never becomes one."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id, self.bos_token_id = min(tokenizer.stop_ids, default=0), tokenizer.bos_id
        self.tokens = [tokenizer.token_bytes(id_) for id_ in range(tokenizer.vocab_size)]
        self.special_token_ids = list(tokenizer.special_tokens.values())

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)
