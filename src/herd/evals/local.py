"""A checkpoint as the harness asks it: likelihoods by `engine.score`, texts by the engine, whole texts by `bpb`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch

from ..engine import Engine, Sampling
from ..engine import Request as EngineRequest
from ..engine.score import Pair, Scorer
from ..errors import EngineError
from ..llama.model import LlamaLM
from ..text.chat import render
from ..text.tokenizer import Tokenizer
from .bpb import compression
from .tasks.task import Answer, Generate, Likelihood, Mode, Rank, Read, Request
from .windows import HeldOut

_PARAGRAPH = re.compile(r"(?<=\n\n)(?=\S)")


class LocalModel:
    """A loaded model under a name; ``hash`` is that of its weights."""

    def __init__(
        self, model: LlamaLM, tokenizer: Tokenizer, *, name: str, hash: str, mode: Mode = "base", max_batch: int = 32
    ) -> None:
        self.name, self.hash, self.mode = name, hash, mode
        self.precision = str(model.dtype).removeprefix("torch.")
        self.model, self.tokenizer = model, tokenizer
        self._engine = Engine(model, tokenizer, max_batch=max_batch)
        self._scorer = Scorer(model)
        self._paragraph = lru_cache(maxsize=8192)(tokenizer.encode)

    def answer(self, requests: Sequence[Request]) -> Iterator[tuple[int, Answer]]:
        """See `harness.Model`."""
        ranks = {n: [self.pair(*pair) for pair in r.pairs] for n, r in enumerate(requests) if isinstance(r, Rank)}
        reads = {n: r for n, r in enumerate(requests) if isinstance(r, Read)}
        asked = {n: self._generate(r) for n, r in enumerate(requests) if isinstance(r, Generate)}
        self._scorer.check(list(ranks.values()))
        for request in asked.values():
            self._check(request)
        yield from self._rank(ranks)
        for n, read in reads.items():
            yield n, self._read(read)
        yield from self._write(asked)

    @property
    def context(self) -> int:
        """Tokens of prompt and answer together that fit."""
        return self._engine.context

    def count(self, text: str) -> int:
        """Tokens of a text."""
        return len(self.tokenizer.encode(text))

    def encode(self, text: str) -> list[int]:
        """The same ids as the tokenizer's, but what is repeated (worked examples) is encoded once.

        No token of Llama's pattern reaches over a newline into the next word, so paragraphs are encoded one by one.
        """
        return [i for paragraph in _PARAGRAPH.split(text) for i in self._paragraph(paragraph)]

    def pair(self, context: str, continuation: str) -> Pair:
        """Ids of both, cut where the whole text's ids are cut, spaces before the cut belonging to the continuation.

        As lm-eval does it: tokens are those of the text as it would be written, not of its two halves.
        """
        bare = context.rstrip()
        continuation, context = context[len(bare) :] + continuation, bare
        context_ids = [self.tokenizer.bos_id, *self.encode(context)]
        whole = [self.tokenizer.bos_id, *self.encode(context + continuation)]
        return Pair(context_ids, whole[len(context_ids) :])

    def _rank(self, ranks: dict[int, list[Pair]]) -> Iterator[tuple[int, Answer]]:
        numbers, items = list(ranks), list(ranks.values())
        for at, scored in self._scorer.score(items):
            likelihoods = zip(items[at], scored, strict=True)
            yield (
                numbers[at],
                Answer(
                    likelihoods=tuple(Likelihood(s.nats, s.greedy, len(pair.continuation)) for pair, s in likelihoods)
                ),
            )

    def _read(self, read: Read) -> Answer:
        ids = self.tokenizer.encode(read.text, bos=True)
        bits = compression(self.model, [HeldOut(ids, len(read.text.encode()))]).bits[0]
        nats = -float(bits) * float(torch.log(torch.tensor(2.0)))
        return Answer(likelihoods=(Likelihood(nats, n_tokens=len(ids) - 1),))

    def _generate(self, request: Generate) -> EngineRequest:
        if isinstance(request.prompt, str):
            ids = [self.tokenizer.bos_id, *self.encode(request.prompt)]
        else:
            tools = list(request.tools) or None
            ids = render(request.prompt, self.tokenizer, tools=tools, form=request.form, generation_prompt=True).ids
        return EngineRequest(ids, Sampling(max_tokens=request.max_tokens, stop=request.stop))

    def _check(self, request: EngineRequest) -> None:
        if len(request.prompt_ids) >= self._engine.context:
            raise EngineError(
                f"a prompt has {len(request.prompt_ids)} tokens, the context holds {self._engine.context}: "
                "use fewer shots or a model with a longer context"
            )

    def _write(self, asked: dict[int, EngineRequest]) -> Iterator[tuple[int, Answer]]:
        """All in one queue, like lengths together; the engine batches them, and each comes when it has ended."""
        order = sorted(asked, key=lambda n: len(asked[n].prompt_ids))
        streams = [self._engine.submit(asked[n]) for n in order]
        try:
            for n, stream in zip(order, streams, strict=True):
                completion = stream.completion()
                yield n, Answer(completion.text, completion.finish_reason)
        finally:
            for stream in streams:
                stream.cancel()
