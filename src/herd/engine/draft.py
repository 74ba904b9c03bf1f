"""Propose draft tokens for speculation, with a small model or by n-gram lookup.

At each step the engine asks its draft for tokens that may follow each sequence, and tells it when a sequence
ends. A draft may answer "not yet" (None), and then that sequence waits. So a small model can read a long
prompt in chunks without delaying the other sequences. When its pages run out, the latest sequences free
theirs and wait, as in the engine. Draft tokens therefore depend on the sequence alone, and so does the answer
to a seed.

Shapes: N tokens of a step, B sequences, D model dim, V vocab.
"""

from __future__ import annotations

from collections import abc
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from ..kernels.page_layout import BYTES
from ..llama.model import LlamaLM
from .cache import Cached, PagedCache
from .memory import page_nbytes
from .ngram import NGramIndex
from .runner import ModelRunner
from .sampling import distribution, draw, most_likely
from .speculate import DraftTokens, draft_uniform
from .stream import Sequence

CATCH_UP_TOKENS = 512
"""Most unread tokens of the sequences that a draft model reads in one step."""


class Draft(Protocol):
    """A source of draft tokens."""

    def propose(self, sequences: abc.Sequence[Sequence], most: abc.Sequence[int]) -> list[DraftTokens | None]:
        """Return at most ``most[i]`` tokens to follow each sequence, oldest first, or None for not yet."""
        ...

    def forget(self, sequence: Sequence) -> None:
        """Drop the state of a sequence that has ended or will begin again later."""
        ...


class NGramDraft:
    """A draft that proposes the continuation of an earlier occurrence of the latest tokens."""

    def __init__(self) -> None:
        self._indexes: dict[Sequence, NGramIndex] = {}

    def propose(self, sequences: abc.Sequence[Sequence], most: abc.Sequence[int]) -> list[DraftTokens | None]:
        drafts: list[DraftTokens | None] = []
        for sequence, n in zip(sequences, most, strict=True):
            index = self._indexes.setdefault(sequence, NGramIndex())
            index.extend(sequence.tokens[len(index) :])
            drafts.append(DraftTokens(index.propose(n)))
        return drafts

    def forget(self, sequence: Sequence) -> None:
        self._indexes.pop(sequence, None)


@dataclass
class _State:
    """A sequence in the draft model's cache: its first ``known`` tokens, followed by draft tokens."""

    sequence: Sequence
    cached: Cached
    known: int = 0
    draft: DraftTokens = field(default_factory=lambda: DraftTokens([]))

    def n_correct(self) -> int:
        """Return the number of tokens in the cache that agree with the sequence after verification."""
        n = self.known
        end = min(self.cached.length, len(self.sequence.tokens) - 1)  # one is read at least, to draft from
        for token, drafted in zip(self.sequence.tokens[n:end], self.draft.tokens, strict=False):
            if token != drafted:
                break
            n += 1
        return n

    def may_continue(self, most: int) -> bool:
        """Return whether another draft token can be of use."""
        processor = self.sequence.logits_processor
        ended = self.draft.tokens[-1] in self.sequence.stop_ids or processor.failed or processor.complete
        return len(self.draft.tokens) < most and not ended


class ModelDraft:
    """A draft model, sampled with each sequence's own settings and constraint.

    Ids from ``n_tokens`` on are padding and never picked. ``n_pages`` bounds its cache, but a single sequence
    always fits.
    """

    def __init__(self, model: LlamaLM, n_tokens: int, n_pages: int, context: int, kind: str) -> None:
        self.model, self._n_tokens = model, n_tokens
        self.context = min(context, model.config.max_context)
        cache_bytes = n_pages * page_nbytes(model.config, BYTES[kind])
        self.cache = PagedCache(model.config, kind, cache_bytes, self.context, model.device)
        self._runner = ModelRunner(model, self.cache)
        self._states: dict[Sequence, _State] = {}

    def propose(self, sequences: abc.Sequence[Sequence], most: abc.Sequence[int]) -> list[DraftTokens | None]:
        # all draft tokens but the last are fed to the model, after the sequence's own tokens
        wanted = {s: min(n, self.context - len(s.tokens) + 1) for s, n in zip(sequences, most, strict=True)}
        parts = self._unread([s for s in sequences if wanted[s] > 0], wanted)
        hidden_BD = self._forward(parts)
        for state, tokens in parts:
            state.known += len(tokens)
            self.cache.remember(state.cached, state.sequence.request.tenant, state.sequence.tokens)
        caught_up = [b for b, (state, _) in enumerate(parts) if state.known == len(state.sequence.tokens)]
        states = [parts[b][0] for b in caught_up]
        if states:
            self._extend(states, hidden_BD[caught_up], wanted)
        drafts = {state.sequence: state.draft for state in states}
        return [drafts.get(s) if wanted[s] > 0 else DraftTokens([]) for s in sequences]

    def forget(self, sequence: Sequence) -> None:
        if (state := self._states.pop(sequence, None)) is not None:
            self.cache.close(state.cached)

    def _extend(self, states: list[_State], hidden_BD: Tensor, wanted: abc.Mapping[Sequence, int]) -> None:
        """Propose draft tokens, one after the other, for sequences whose tokens have all been read.

        The draft tokens are pushed to the logits processors of the sequences, and popped at the end.
        """
        going = states
        while going:
            going = [s for s in self._pick(hidden_BD, going) if s.may_continue(wanted[s.sequence])]
            for state in going:
                state.sequence.logits_processor.push(state.draft.tokens[-1:])
            hidden_BD = self._forward([(state, state.draft.tokens[-1:]) for state in going])
        for state in states:
            if not state.sequence.logits_processor.failed:
                # the last draft token was not pushed, unless the next one could not be computed
                pushed = state.cached.length - state.known
                state.sequence.logits_processor.pop(state.draft.tokens[:pushed])

    def _unread(
        self, sequences: abc.Sequence[Sequence], wanted: abc.Mapping[Sequence, int]
    ) -> list[tuple[_State, list[int]]]:
        """Return tokens that the draft model has not read, shortest part first, `CATCH_UP_TOKENS` in all."""
        parts = []
        for sequence in sequences:
            state = self._states.get(sequence) or self._open(sequence)
            state.known = state.n_correct()
            self.cache.truncate(state.cached, state.known)
            state.draft = DraftTokens([])
            if self._make_room(state, len(sequence.tokens) + wanted[sequence] - 1):
                parts.append((state, sequence.tokens[state.known :]))
        parts.sort(key=lambda part: len(part[1]))
        chunks = []
        room = CATCH_UP_TOKENS + 2 * len(parts)
        for state, tokens in parts:
            if room:
                chunks.append((state, tokens[:room]))
                room -= min(room, len(tokens))
        return chunks

    def _open(self, sequence: Sequence) -> _State:
        cached = self.cache.open()
        self.cache.match(cached, sequence.digests)
        self._states[sequence] = _State(sequence, cached, cached.length)
        return self._states[sequence]

    def _make_room(self, state: _State, length: int) -> bool:
        """Take pages for ``length`` tokens, if needed from later sequences. Return False if it must wait."""
        while (lacking := self.cache.lacking(state.cached, length)) > self.cache.pages.available:
            latest = max(self._states.values(), key=lambda other: other.sequence.number)
            if latest is state:
                if len(self._states) == 1:
                    break
                self.forget(state.sequence)
                return False
            self.forget(latest.sequence)
        if lacking:
            self.cache.grow(state.cached, length)
        return True

    def _forward(self, parts: abc.Sequence[tuple[_State, abc.Sequence[int]]]) -> Tensor:
        """Feed these tokens and return the hidden state of each sequence's last one, (B, D)."""
        if not parts:
            return torch.empty(0)
        hidden_ND = self._runner(
            [(state.cached, len(tokens)) for state, tokens in parts],
            [t for _, tokens in parts for t in tokens],
        )
        ends = list(accumulate(len(tokens) for _, tokens in parts))
        return hidden_ND[[end - 1 for end in ends]]

    def _pick(self, hidden_BD: Tensor, states: abc.Sequence[_State]) -> list[_State]:
        """Add one draft token to each of ``states`` with finite logits, and return those."""
        logits_BV = self.model.lm_head(hidden_BD).float()
        logits_BV[:, self._n_tokens :] = -torch.inf
        for logits_V, state in zip(logits_BV, states, strict=True):
            with suppress(Exception):  # the sequence fails when the model's own logits are processed
                state.sequence.logits_processor.process(logits_V)
        tokens, finite = most_likely(logits_BV)
        drawn = [b for b, state in enumerate(states) if finite[b] and not state.sequence.sampling.greedy]
        if drawn:
            some = [states[b] for b in drawn]
            p_BV = distribution(logits_BV[drawn], [state.sequence.sampling for state in some])
            u = [draft_uniform(s.sequence.seed, s.sequence.n_new + len(s.draft.tokens)) for s in some]
            for b, p_V, token in zip(drawn, p_BV, draw(p_BV, u).tolist(), strict=True):
                tokens[b], draft = token, states[b].draft
                draft.q = [*(draft.q or ()), p_V]
        for state, token, ok in zip(states, tokens, finite, strict=True):
            if ok:
                state.draft.tokens.append(token)
        return [state for state, ok in zip(states, finite, strict=True) if ok]
