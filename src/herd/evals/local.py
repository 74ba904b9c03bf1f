"""A checkpoint as a model of the harness, with likelihoods from `engine.score` and texts from the engine."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache

from ..dtypes import short_name
from ..engine import Constraint, Engine, Sampling
from ..engine import Request as EngineRequest
from ..engine.score import Pair, Scorer
from ..errors import ContextError
from ..llama.model import LlamaLM
from ..text.ranks_tokenizer import RanksTokenizer
from ..text.tokenizer import Tokenizer
from .bpb import compression
from .tasks.task import Answer, Generate, GenerateJson, Likelihood, Mode, Rank, Read, Request
from .windows import HeldOut

SLICE = 512
"""Requests that are encoded at a time, so that the first answer does not wait for all of them."""
_PARAGRAPH = re.compile(r"(?<=\n\n)(?=\S)")


class CheckpointModel:
    """A loaded model with a name and the hash of its weights."""

    def __init__(
        self, model: LlamaLM, tokenizer: Tokenizer, *, name: str, hash: str, mode: Mode = "base",
        max_batch: int = 32,
    ) -> None:  # fmt: skip
        self.name, self.hash, self.mode = name, hash, mode
        self.precision = short_name(model.dtype)
        self.model, self.tokenizer = model, tokenizer
        self._engine = Engine(model, tokenizer, max_batch=max_batch)
        self._scorer = Scorer(model)
        self._paragraph = lru_cache(maxsize=8192)(tokenizer.encode)

    def answer(self, requests: Sequence[Request]) -> Iterator[tuple[int, Answer]]:
        """Yield answers as `harness.Model` says. The longest request is checked first."""
        numbered = list(enumerate(requests))
        if numbered:
            self._encoded([max(numbered, key=lambda pair: _n_chars(pair[1]))])
        for start in range(0, len(requests), SLICE):
            some = numbered[start : start + SLICE]
            ranks, asked = self._encoded(some)
            yield from self._rank(ranks)
            for n, request in some:
                if isinstance(request, Read):
                    yield n, self._read(request)
            in_chat = {n for n, r in some if isinstance(r, Generate) and not isinstance(r.prompt, str)}
            for n, answer in self._write(asked):
                yield n, self._without_reasoning(answer) if n in in_chat else answer

    @property
    def context(self) -> int:
        """Most tokens of prompt and answer together."""
        return self._engine.context

    def count(self, text: str) -> int:
        """Return the number of tokens of a text."""
        return len(self.tokenizer.encode(text))

    def encode(self, text: str) -> list[int]:
        """Return the tokenizer's ids. Repeated paragraphs (worked examples) are encoded only once.

        With Llama 3's pattern, paragraphs can be encoded separately, because no token contains a newline and
        the word after it.
        """
        if not isinstance(self.tokenizer, RanksTokenizer):
            return self.tokenizer.encode(text)
        return [i for paragraph in _PARAGRAPH.split(text) for i in self._paragraph(paragraph)]

    def pair(self, context: str, continuation: str) -> Pair:
        """Return the ids of context and continuation as lm-eval does: encode the whole text, then split it.

        Spaces between the parts belong to the continuation. If there is no token before the first scored one,
        the vocabulary's begin-of-text token is used, even if the tokenizer does not add it to every text.
        """
        bare = context.rstrip()
        continuation, context = context[len(bare) :] + continuation, bare
        context_ids = [*self.tokenizer.start_ids, *self.encode(context)]
        whole = [*self.tokenizer.start_ids, *self.encode(context + continuation)]
        if not context_ids:
            bos = self.tokenizer.bos_id
            context_ids = self.tokenizer.prefix_ids if bos is None else [bos]
            whole = [*context_ids, *whole]
        return Pair(context_ids, whole[len(context_ids) :])

    def _encoded(
        self, some: Sequence[tuple[int, Request]]
    ) -> tuple[dict[int, list[Pair]], dict[int, EngineRequest]]:
        """Return (ids to rank, requests to generate), both by index.

        Raises `ContextError` if one is too long.
        """
        ranks = {n: [self.pair(*pair) for pair in r.pairs] for n, r in some if isinstance(r, Rank)}
        asked = {n: self._generate(r) for n, r in some if isinstance(r, Generate)}
        self._scorer.check(list(ranks.values()))
        for request in asked.values():
            if len(request.prompt_ids) >= self.context:
                raise ContextError(
                    f"a prompt has {len(request.prompt_ids)} tokens, the context has {self.context}: "
                    "use a model with a longer context"
                )
        return ranks, asked

    def _rank(self, ranks: dict[int, list[Pair]]) -> Iterator[tuple[int, Answer]]:
        numbers, items = list(ranks), list(ranks.values())
        for at, scored in self._scorer.score(items):
            likelihoods = (
                Likelihood(score.nats, score.greedy, len(pair.continuation))
                for pair, score in zip(items[at], scored, strict=True)
            )
            yield numbers[at], Answer(likelihoods=tuple(likelihoods))

    def _read(self, read: Read) -> Answer:
        ids = [*self.tokenizer.prefix_ids, *self.tokenizer.encode(read.text)]
        bits = compression(self.model, [HeldOut(ids, len(read.text.encode()))]).bits[0]
        return Answer(likelihoods=(Likelihood(-float(bits) * math.log(2), n_tokens=len(ids) - 1),))

    def _generate(self, request: Generate) -> EngineRequest:
        if isinstance(request.prompt, str):
            ids = [*self.tokenizer.start_ids, *self.encode(request.prompt)]
        else:
            chat = self.tokenizer.require_chat()
            form = request.tool_call_format
            ids = chat.render(
                request.prompt,
                tools=list(request.tools) or None,
                tool_call_format=form if form in chat.tool_call_formats else None,
                generation_prompt=True,
            ).ids
        sampling = Sampling(max_tokens=request.max_tokens, stop=request.stop)
        constraint = Constraint.json_schema(request.schema) if isinstance(request, GenerateJson) else None
        return EngineRequest(ids, sampling, constraint=constraint)

    def _without_reasoning(self, answer: Answer) -> Answer:
        return replace(answer, text=self.tokenizer.require_chat().parser().parse(answer.text).content)

    def _write(self, asked: dict[int, EngineRequest]) -> Iterator[tuple[int, Answer]]:
        """Generate all texts, in order of length so that the engine batches similar lengths."""
        order = sorted(asked, key=lambda n: len(asked[n].prompt_ids))
        streams = [self._engine.submit(asked[n]) for n in order]
        try:
            for n, stream in zip(order, streams, strict=True):
                completion = stream.completion()
                yield n, Answer(completion.text, completion.finish_reason)
        finally:
            for stream in streams:
                stream.cancel()


def _n_chars(request: Request) -> int:
    if isinstance(request, Rank):
        return max(len(context) + len(continuation) for context, continuation in request.pairs)
    return len(request.text if isinstance(request, Read) else str(request.prompt))
