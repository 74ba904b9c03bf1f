"""Answers that are right by construction: a JSON schema, a regular expression or a grammar says what may come next.

A `Constraint` is what the caller asks for; a `Guide` is where one answer stands in it. Before each token the guide
marks the tokens that can still lead to a valid answer, and the sampler sees no other (Willard & Louf, arXiv
2307.09702). The parsing is llguidance's: an Earley parser over lexemes that walks the vocabulary as a trie, about 50 µs
a token with 128,256 tokens. It is a plain dependency of Herd: one small wheel without dependencies, and an engine
without it would have to refuse what it promises.

Fail closed: what cannot be held is refused when the request is submitted, a keyword of JSON Schema that the parser does
not know included, and a guide that can go no further raises; nothing ever continues unconstrained. An answer that
ends by ``max_tokens`` is the valid *beginning* of one: look at its finish reason.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

from ..errors import EngineError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from torch import Tensor

    from ..text.tokenizer import Tokenizer

WHITESPACE = r"[ \t\n\r]{1,40}"
"""Between JSON's tokens: enough for any usual layout, bounded because a model in doubt would write blanks for ever."""


@dataclass(frozen=True)
class Constraint:
    """What an answer must be, from its first to its last character. Make one with `json_schema`, `regex` or `lark`."""

    kind: Literal["json_schema", "regex", "lark"]
    text: str

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | bool | str) -> Constraint:
        """JSON that is valid under ``schema`` (a mapping, or its text); properties come in the schema's order."""
        try:
            schema = json.loads(schema if isinstance(schema, str) else json.dumps(schema))
        except (TypeError, ValueError, RecursionError) as error:
            raise EngineError(f"the JSON schema is no JSON: {error}") from None
        if schema is True:
            schema = {}
        if not isinstance(schema, dict):
            raise EngineError(f"a JSON schema is an object or true, not {json.dumps(schema)[:60]}")
        return cls("json_schema", json.dumps(schema))

    @classmethod
    def regex(cls, pattern: str) -> Constraint:
        """Text that ``pattern`` matches as a whole: Rust's syntax, without look-around and back-references."""
        return cls("regex", pattern)

    @classmethod
    def lark(cls, grammar: str) -> Constraint:
        """Text of a context-free grammar in llguidance's dialect of Lark; it begins at the rule ``start``."""
        return cls("lark", grammar)


class Guide:
    """One answer under its constraint. A function of its tokens only: `push` those it has, and it is where it was.

    Raises EngineError, naming the problem, for a constraint that is malformed, unsupported or that nothing satisfies.
    """

    def __init__(self, constraint: Constraint, tokenizer: Tokenizer) -> None:
        from llguidance import LLMatcher, LLParserLimits

        self._kind = constraint.kind.replace("_", " ")
        self._n_vocab = tokenizer.vocab_size
        try:
            limits = LLParserLimits(verbose_errors=False)
            self._matcher: LLMatcher = LLMatcher(
                _vocabulary(tokenizer), _grammar(constraint), log_level=0, limits=limits
            )
        except ValueError as error:
            raise EngineError(self._told(str(error))) from None
        self._check()
        for warning in self._matcher.get_grammar_warnings():
            warnings.warn(self._told(warning), stacklevel=2)
        self.allowed()  # a grammar that is well-formed and that nothing satisfies shows itself here

    @property
    def complete(self) -> bool:
        """Nothing more can follow."""
        return self._matcher.is_stopped()

    @property
    def failed(self) -> bool:
        """It went beyond what the parser can do; whatever is asked next raises."""
        return self._matcher.is_error()

    def allowed(self) -> Tensor:
        """(V,) bool: tokens that may come next. Where the answer may end here, the tokenizer's stop tokens as well."""
        import numpy as np
        import torch

        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        return torch.from_numpy(np.unpackbits(bits, count=self._n_vocab, bitorder="little")).bool()

    def push(self, tokens: Sequence[int]) -> None:
        """Go on by ``tokens``, each of which was allowed."""
        self._matcher.consume_tokens(list(tokens))
        self._check()

    def pop(self, n: int) -> None:
        """Go back by the last ``n`` tokens."""
        self._matcher.rollback(n)
        self._check()

    def _check(self) -> None:
        if self.failed:
            raise EngineError(self._told(self._matcher.get_error()))

    def _told(self, problem: str) -> str:
        if problem.startswith("NoExtension"):
            problem = "nothing can come next that leads to an answer"
        return f"the {self._kind} cannot be followed: {' '.join(problem.split())[:300]}"


def _grammar(constraint: Constraint) -> str:
    from llguidance import LLMatcher

    if constraint.kind == "regex":
        return LLMatcher.grammar_from_regex(constraint.text)
    if constraint.kind == "lark":
        return LLMatcher.grammar_from_lark(constraint.text)
    # a schema may carry options for the parser under "x-guidance": being lenient is not one of them
    options: Any = {"whitespace_pattern": WHITESPACE, "lenient": False}
    return LLMatcher.grammar_from_json_schema(constraint.text, overrides=options)


@lru_cache(maxsize=4)
def _vocabulary(tokenizer: Tokenizer) -> LLTokenizer:
    """The vocabulary as the parser's trie; half a second of work for 128,256 tokens, so it is kept."""
    from llguidance import LLTokenizer, TokenizerWrapper

    return LLTokenizer(
        TokenizerWrapper(_Tokens(tokenizer)),
        n_vocab=tokenizer.vocab_size,
        eos_token=sorted(tokenizer.stop_ids),
    )


class _Tokens:
    """Our tokenizer as llguidance wants to see it. Special tokens are named, so that text never becomes one."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id, self.bos_token_id = tokenizer.eos_id, tokenizer.bos_id
        self.tokens = [tokenizer.token_bytes(id_) for id_ in range(tokenizer.vocab_size)]
        self.special_token_ids = list(tokenizer.special_tokens.values())

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)
