"""Who guesses for speculation: a small model with a cache of its own, or what stood here before.

A draft is asked at each step for tokens that may follow each row, and told when a row goes. It may answer "not yet"
(None): then the row waits. So a small model catches up with a long prompt piece by piece, without holding the others
up; and when its pages run out the latest rows give theirs back and wait, as in the engine. Guesses are therefore a
function of the row alone, whatever else is going on, and with them the tokens that a seed gives.

Shapes: N tokens of a step, B rows, D model dim, V vocab.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from ..errors import EngineError
from ..kernels.page_layout import BYTES
from ..llama.model import LlamaLM
from .cache import Cached, PagedCache
from .memory import page_nbytes
from .ngram import NGramIndex
from .sampling import distribution, draw, likeliest
from .speculate import Guess, guess_uniform
from .stream import Row
from .trunk import Trunk

CATCH_UP = 512
"""Most tokens a draft reads in one step of what it does not know yet."""


class Draft(Protocol):
    """Anything that guesses."""

    def guess(self, rows: Sequence[Row], most: Sequence[int]) -> list[Guess | None]:
        """At most ``most[i]`` tokens to follow each row's, oldest row first; None: not yet, ask again."""
        ...

    def forget(self, row: Row) -> None:
        """The row is over, or begins again later."""
        ...


class NGramDraft:
    """Guesses what followed the same tokens before, in prompt and answer."""

    def __init__(self) -> None:
        self._indexes: dict[Row, NGramIndex] = {}

    def guess(self, rows: Sequence[Row], most: Sequence[int]) -> list[Guess | None]:
        guesses: list[Guess | None] = []
        for row, n in zip(rows, most, strict=True):
            index = self._indexes.setdefault(row, NGramIndex())
            index.extend(row.tokens[len(index) :])
            guesses.append(Guess(index.propose(n)))
        return guesses

    def forget(self, row: Row) -> None:
        self._indexes.pop(row, None)


@dataclass
class _State:
    """What the draft's cache holds of a row: its first ``known`` tokens, and guesses behind them."""

    row: Row
    cached: Cached
    known: int = 0
    guess: Guess = field(default_factory=lambda: Guess([]))

    def settled(self) -> int:
        """How many of the row's tokens are in the cache, now that it has decided which guesses were right."""
        n = self.known
        end = min(self.cached.length, len(self.row.tokens) - 1)  # one at least is read, to guess from
        for token, guessed in zip(self.row.tokens[n:end], self.guess.tokens, strict=False):
            if token != guessed:
                break
            n += 1
        return n

    def may_go_on(self, most: int) -> bool:
        """Whether one more guess is worth making."""
        last, rules = self.guess.tokens[-1], self.row.rules
        return (
            len(self.guess.tokens) < most
            and last not in self.row.stop_ids
            and not (rules is not None and (rules.failed or rules.complete))
        )


class ModelDraft:
    """Guesses with ``model``, under each row's own temperature, cuts, penalties and constraint.

    ``n_tokens``: ids from there on are no tokens. ``n_pages`` bounds its cache, but one row alone always fits.
    """

    def __init__(self, model: LlamaLM, n_tokens: int, n_pages: int, context: int, kind: str) -> None:
        self.model, self._n_tokens = model, n_tokens
        self.context = min(context, model.config.max_context)
        cache_bytes = n_pages * page_nbytes(model.config, BYTES[kind])
        self.cache = PagedCache(model.config, kind, cache_bytes, self.context, model.device)
        self._trunk = Trunk(model, self.cache)
        self._states: dict[Row, _State] = {}

    def guess(self, rows: Sequence[Row], most: Sequence[int]) -> list[Guess | None]:
        # each guess but the last is fed, behind the row's own tokens
        wanted = {row: min(n, self.context - len(row.tokens) + 1) for row, n in zip(rows, most, strict=True)}
        parts = self._behind([row for row in rows if wanted[row] > 0], wanted)
        hidden_BD = self._forward(parts)
        for state, tokens in parts:
            state.known += len(tokens)
            self.cache.remember(state.cached, state.row.request.tenant, state.row.tokens)
        caught_up = [b for b, (state, _) in enumerate(parts) if state.known == len(state.row.tokens)]
        going = [parts[b][0] for b in caught_up]
        guesses = {state.row: state.guess for state in going}
        if going:
            self._chain(going, hidden_BD[caught_up], wanted)
        return [guesses.get(row) if wanted[row] > 0 else Guess([]) for row in rows]

    def forget(self, row: Row) -> None:
        if (state := self._states.pop(row, None)) is not None:
            self.cache.close(state.cached)

    def _chain(self, going: list[_State], hidden_BD: Tensor, wanted: Mapping[Row, int]) -> None:
        """Guess after guess for rows that are read to their end; their rules go along and come back."""
        started = going
        while going:
            self._pick(hidden_BD, going)
            going = [s for s in going if s.may_go_on(wanted[s.row])]
            for state in going:
                if state.row.rules is not None:
                    state.row.rules.push(state.guess.tokens[-1:])
            hidden_BD = self._forward([(state, state.guess.tokens[-1:]) for state in going])
        for state in started:
            if state.row.rules is not None and not state.row.rules.failed:
                state.row.rules.pop(state.guess.tokens[:-1])

    def _behind(self, rows: Sequence[Row], wanted: Mapping[Row, int]) -> list[tuple[_State, list[int]]]:
        """What each row has said that the draft has not read, the least first, `CATCH_UP` tokens in all."""
        parts = []
        for row in rows:
            state = self._states.get(row) or self._open(row)
            state.known = state.settled()
            self.cache.truncate(state.cached, state.known)
            state.guess = Guess([])
            if self._make_room(state, len(row.tokens) + wanted[row] - 1):
                parts.append((state, row.tokens[state.known :]))
        parts.sort(key=lambda part: len(part[1]))
        room, cut = CATCH_UP + 2 * len(parts), []
        for state, tokens in parts:
            if room:
                cut.append((state, tokens[:room]))
                room -= min(room, len(tokens))
        return cut

    def _open(self, row: Row) -> _State:
        cached = self.cache.open()
        self.cache.match(cached, row.digests)
        self._states[row] = _State(row, cached, cached.length)
        return self._states[row]

    def _make_room(self, state: _State, length: int) -> bool:
        """Pages for ``length`` tokens, taken from rows that came later if need be; False: it must wait."""
        while (lacking := self.cache.lacking(state.cached, length)) > self.cache.pages.available:
            latest = max(self._states.values(), key=lambda other: other.row.number)
            if latest is state:
                if len(self._states) == 1:
                    break
                self.forget(state.row)
                return False
            self.forget(latest.row)
        if lacking:
            self.cache.grow(state.cached, length)
        return True

    def _forward(self, parts: Sequence[tuple[_State, Sequence[int]]]) -> Tensor:
        """Feed these tokens; hidden states (B, D) of each row's last."""
        if not parts:
            return torch.empty(0)
        hidden_ND = self._trunk(
            [(state.cached, len(tokens)) for state, tokens in parts],
            [t for _, tokens in parts for t in tokens],
        )
        ends = list(accumulate(len(tokens) for _, tokens in parts))
        return hidden_ND[[end - 1 for end in ends]]

    def _pick(self, hidden_BD: Tensor, going: Sequence[_State]) -> None:
        """One more guess for each of these rows."""
        logits_BV = self.model.lm_head(hidden_BD).float()
        logits_BV[:, self._n_tokens :] = -torch.inf
        for logits_V, state in zip(logits_BV, going, strict=True):
            if state.row.rules is not None:
                with suppress(EngineError):  # the row fails when the model's own logits come
                    state.row.rules.apply(logits_V)
        tokens = likeliest(logits_BV)
        drawn = [b for b, state in enumerate(going) if not state.row.sampling.greedy]
        if drawn:
            rows = [going[b].row for b in drawn]
            p_BV = distribution(logits_BV[drawn], [row.sampling for row in rows])
            u = [
                guess_uniform(r.seed, r.n_new + len(going[b].guess.tokens))
                for b, r in zip(drawn, rows, strict=True)
            ]
            for b, p_V, token in zip(drawn, p_BV, draw(p_BV, u).tolist(), strict=True):
                tokens[b], guess = token, going[b].guess
                guess.q = [*(guess.q or ()), p_V]
        for state, token in zip(going, tokens, strict=True):
            state.guess.tokens.append(token)
