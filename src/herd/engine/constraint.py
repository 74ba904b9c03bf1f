"""Constrain answers by a JSON schema, a regular expression or a grammar, token by token.

A `Constraint` is the request of a caller, and a `Guide` follows one answer through it. Before each token the
guide marks the tokens that can still lead to a valid answer, and the sampler picks only among these (Willard
& Louf, arXiv 2307.09702). llguidance does the parsing: an Earley parser over lexemes that walks the
vocabulary as a trie, about 50 µs per token with 128,256 tokens.

A constraint that cannot be guaranteed is refused before its request begins. If a guide fails later, the
answer ends with an error: it never continues unconstrained. `schema.py` refuses numbers that llguidance would
change. Every regular expression and grammar, and every JSON schema that is long or has a pattern, is first
compiled in a child process with limits, because llguidance can overflow its stack, and Python cannot catch
that. An answer that ends by ``max_tokens`` is the *beginning* of a valid one: look at its finish reason.
"""

from __future__ import annotations

import copy
import hashlib
import json
import subprocess
import sys
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

from ..errors import ConstraintError, EngineError
from .schema import canonical_schema

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from torch import Tensor

    from ..text.tokenizer import Tokenizer

WHITESPACE = r"[ \t\n\r]{1,40}"
"""Blanks between the tokens of JSON. They are bounded because an unsure model may write them forever."""
MAX_TEXT = 500_000
"""Characters of a constraint. llguidance refuses grammars that are not much longer."""
PLAIN_TEXT = 4_000
"""Characters of a JSON schema that, without patterns, needs no child process. It compiles in milliseconds and
cannot nest deep enough to overflow a stack of 8 MB (that takes 1,000 references)."""
CHILD_SECONDS = 4
"""Limit on the processor time of the child process. An ordinary constraint takes 0.05 s."""
CHILD_WAIT_SECONDS = 60
"""Limit on the time that the child process may take on a busy machine."""
CHILD_BYTES = 2 << 30
"""Limit on the address space of the child process, in bytes."""
MASK_SECONDS = 1.0
"""Limit on the processor time for the tokens that may come next. Other answers wait meanwhile."""
REMEMBERED_GUIDES = 64
"""Compiled constraints that an engine keeps, by hash."""
REMEMBERED_VERDICTS = 10_000
"""Constraints whose verdict from a child process is remembered, by hash."""


@dataclass(frozen=True)
class Constraint:
    """The form that a whole answer must have. Make one with `json_schema`, `regex` or `lark`."""

    kind: Literal["JSON schema", "regular expression", "grammar"]
    text: str

    def __post_init__(self) -> None:
        if (n := len(self.text)) > MAX_TEXT:
            raise ConstraintError(
                f"the {self.kind} has {n:,} characters, and the limit is {MAX_TEXT:,}: simplify it"
            )
        if self.kind == "JSON schema":
            object.__setattr__(self, "text", canonical_schema(self.text))

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | bool | str) -> Constraint:
        """Return a constraint to JSON that is valid under ``schema``, with the properties in its order."""
        try:
            text = schema if isinstance(schema, str) else json.dumps(schema, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise ConstraintError(f"the JSON schema is not valid JSON: {error}") from None
        return cls("JSON schema", text)

    @classmethod
    def regex(cls, pattern: str) -> Constraint:
        """Return a constraint to text that ``pattern``, in Rust's syntax, matches as a whole."""
        return cls("regular expression", pattern)

    def check(self) -> None:
        """Raise ConstraintError if llguidance cannot follow this form. Needs no tokenizer."""
        from llguidance import LLMatcher

        try:
            problem = LLMatcher.validate_grammar(_grammar(self))
        except ValueError as error:
            problem = str(error)
        if problem:
            raise ConstraintError(self.problem(f"is malformed or not supported: {problem}"))

    def problem(self, text: str) -> str:
        """Return a message about this constraint on one line."""
        return f"the {self.kind} {' '.join(text.split())[:330]}"

    @classmethod
    def lark(cls, grammar: str) -> Constraint:
        """Return a constraint to a grammar in llguidance's dialect of Lark. Its first rule is ``start``."""
        return cls("grammar", grammar)


class Guide:
    """The state of a constraint's parser after the tokens of one answer, which are pushed and popped.

    Raises ConstraintError, naming the problem, for a constraint that is malformed, not supported or that no
    answer satisfies.
    """

    def __init__(self, constraint: Constraint, tokenizer: Tokenizer) -> None:
        from llguidance import LLMatcher, LLParserLimits

        self._message = constraint.problem
        self._n_vocab = tokenizer.vocab_size
        limits = LLParserLimits(verbose_errors=False)
        try:
            grammar = _grammar(constraint)
            self._matcher: LLMatcher = LLMatcher(_vocabulary(tokenizer), grammar, log_level=0, limits=limits)
            problem = self._matcher.get_error() if self.failed else ""
        except ValueError as error:
            problem = str(error)
        if problem:
            raise ConstraintError(self._message(f"is malformed or not supported: {problem}"))
        for warning in self._matcher.get_grammar_warnings():
            warnings.warn(self._message(f"compiles with a warning: {warning}"), stacklevel=2)
        self.allowed()  # raises if the constraint is well-formed but no answer satisfies it

    def fresh_copy(self) -> Guide:
        """Return a guide for another answer in the same state, without compiling the constraint again."""
        twin = copy.copy(self)
        twin._matcher = self._matcher.deep_copy()
        return twin

    @property
    def complete(self) -> bool:
        """Whether the answer is valid and nothing more can follow."""
        return self._matcher.is_stopped() and not self.failed

    @property
    def failed(self) -> bool:
        """Whether the parser failed. `allowed`, `push` and `pop` then raise ConstraintError."""
        return self._matcher.is_error()

    def allowed(self) -> Tensor:
        """Return a mask of the tokens that may come next (stop tokens if the answer may end), (V,) bool."""
        import numpy as np
        import torch

        start = time.thread_time()
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        if (seconds := time.thread_time() - start) > MASK_SECONDS:
            took = f"takes {seconds:.1f} s for one token, the limit is {MASK_SECONDS} s: simplify it"
            raise ConstraintError(self._message(took))
        return torch.from_numpy(np.unpackbits(bits, count=self._n_vocab, bitorder="little")).bool()

    def push(self, tokens: Sequence[int]) -> None:
        """Append ``tokens``. Raises ConstraintError if one of them is not allowed."""
        self._matcher.consume_tokens(list(tokens))
        self._check()

    def pop(self, n: int) -> None:
        """Remove the last ``n`` tokens."""
        self._matcher.rollback(n)
        self._check()

    def _check(self) -> None:
        if self.failed:
            problem = self._matcher.get_error()
            if problem.startswith("NoExtension"):
                problem = "nothing can come next that leads to a valid answer"
            raise ConstraintError(self._message(f"cannot be followed: {problem}"))


class GuideCache:
    """Guides for the answers of one tokenizer. Each constraint is compiled once. Safe from any thread."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._lock = tokenizer, threading.Lock()
        self._compiled: OrderedDict[bytes, Future[Guide]] = OrderedDict()

    def guide(self, constraint: Constraint) -> Guide:
        """Return a guide for a new answer. Raises EngineError if the constraint cannot be followed."""
        text = f"{constraint.kind}\n{constraint.text}"
        digest = hashlib.sha256(text.encode(errors="surrogatepass")).digest()
        with self._lock:
            compiled = self._compiled.get(digest)
            if mine := compiled is None:
                compiled = self._compiled[digest] = Future()
            self._compiled.move_to_end(digest)
            if len(self._compiled) > REMEMBERED_GUIDES:
                self._compiled.popitem(last=False)
        assert compiled is not None
        if mine:
            try:
                compiled.set_result(Guide(constraint, self._tokenizer))
            except BaseException as error:
                compiled.set_exception(error)
                with self._lock:
                    self._compiled.pop(digest, None)
        return compiled.result().fresh_copy()


def _grammar(constraint: Constraint) -> str:
    """Return a constraint as llguidance's grammar. Raises ValueError if it is malformed.

    Raises ConstraintError if compiling it takes too long, takes too much memory or crashes llguidance.
    """
    from llguidance import LLMatcher

    text = constraint.text
    if constraint.kind == "regular expression":
        grammar = LLMatcher.grammar_from_regex(text)
    elif constraint.kind == "grammar":
        grammar = LLMatcher.grammar_from_lark(text)
    else:
        options: Any = {"whitespace_pattern": WHITESPACE, "lenient": False}
        grammar = LLMatcher.grammar_from_json_schema(text, overrides=options)
        if len(text) <= PLAIN_TEXT and '"pattern' not in text:  # nor "patternProperties"
            return grammar
    if not _compiles_in_a_child(grammar):
        raise ConstraintError(
            f"the {constraint.kind} is too complex: compiling it takes more than {CHILD_SECONDS} s or "
            f"{CHILD_BYTES >> 30} GiB, or crashes llguidance; simplify it"
        )
    return grammar


COMPILE = f"""
import os, resource, sys
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
os.nice(10)
resource.setrlimit(resource.RLIMIT_CPU, ({CHILD_SECONDS}, {CHILD_SECONDS}))
resource.setrlimit(resource.RLIMIT_AS, ({CHILD_BYTES}, {CHILD_BYTES}))
limits = LLParserLimits(verbose_errors=False)
LLMatcher(LLTokenizer("byte"), sys.stdin.read(), log_level=0, limits=limits).compute_bitmask()
"""


_verdicts: dict[bytes, bool] = {}


def _compiles_in_a_child(grammar: str) -> bool:
    """Return whether a process with limits survives compiling ``grammar``, even if llguidance refuses it.

    The verdict is remembered by the grammar's hash. Raises EngineError, and remembers nothing, if the process
    cannot be started or waits too long on a busy machine.
    """
    digest = hashlib.sha256(grammar.encode()).digest()
    if digest not in _verdicts:
        command = [sys.executable, "-P", "-c", COMPILE]
        try:
            child = subprocess.run(
                command, input=grammar.encode(), capture_output=True, timeout=CHILD_WAIT_SECONDS
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise EngineError(f"the process that compiles a constraint failed: {error}; try again") from None
        while len(_verdicts) >= REMEMBERED_VERDICTS:
            del _verdicts[next(iter(_verdicts))]
        _verdicts[digest] = child.returncode == 0
    return _verdicts[digest]


@lru_cache(maxsize=4)
def _vocabulary(tokenizer: Tokenizer) -> LLTokenizer:
    """Return the vocabulary as llguidance's trie. Building it takes half a second for 128,256 tokens."""
    from llguidance import LLTokenizer, TokenizerWrapper

    return LLTokenizer(
        TokenizerWrapper(_Tokens(tokenizer)),
        n_vocab=tokenizer.vocab_size,
        eos_token=sorted(tokenizer.stop_ids),
    )


class _Tokens:
    """A tokenizer for llguidance. Its special tokens are listed, so that text never becomes one."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id, self.bos_token_id = min(tokenizer.stop_ids, default=0), tokenizer.bos_id
        self.tokens = [tokenizer.token_bytes(id_) for id_ in range(tokenizer.vocab_size)]
        self.special_token_ids = list(tokenizer.special_tokens.values())

    def __call__(self, text: str) -> list[int]:
        if not self._tokenizer.adds_space:
            return self._tokenizer.encode(text)
        # llguidance expects the bytes of the text and no space before it: encode it as the next line of
        # another text.
        before = len(self._tokenizer.encode("\n"))
        return self._tokenizer.encode("\n" + text)[before:]
