"""Teachers that answer prompts: a model of this machine, or one behind OpenAI's API."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Protocol

from ..checkpoint import checkpoint_hash, load_model, load_tokenizer
from ..engine import Engine, Sampling
from ..engine import Request as EngineRequest
from ..errors import DataError, HerdError
from ..evals.endpoint import EndpointModel
from ..text import Tokenizer

AT_ONCE = 32
"""Answers that are written together."""
TEMPLATE_TOKENS = 512
"""Most tokens that an endpoint's chat template adds to the texts of a prompt. Some add a system message."""
Message = dict[str, Any]


@dataclass(frozen=True)
class SynthOptions:
    """Options of a synthesis: prompts to the teacher, accepted answers, and limits.

    ``agree`` is the fraction of samples that must say the same if nothing else verifies an answer.
    """

    samples: int = 1
    temperature: float = 0.7
    max_tokens: int = 512
    agree: float = 0.4
    similarity: float = 0.8
    budget_tokens: int | None = None
    budget_usd: float | None = None
    usd_per_mtok: float = 0.0
    seed: int = 0

    @property
    def limited(self) -> bool:
        """Whether there is a budget."""
        return self.budget_tokens is not None or self.budget_usd is not None

    @property
    def at_once(self) -> int:
        """The number of prompts that are answered together."""
        return max(1, AT_ONCE // self.samples)

    def spent(self, tokens: int) -> float:
        """Return the cost of some tokens in USD."""
        return tokens / 1e6 * self.usd_per_mtok

    def affords(self, tokens: int) -> bool:
        """Return whether ``tokens`` in all are within the budget."""
        over = self.budget_tokens is not None and tokens > self.budget_tokens
        return not over and (self.budget_usd is None or self.spent(tokens) <= self.budget_usd)


class AnswerTeacher(Protocol):
    """A model that answers. ``hash`` identifies it in the provenance."""

    name: str
    hash: str

    def answers(
        self, prompts: Sequence[Sequence[Message]], options: SynthOptions
    ) -> Iterable[list[tuple[str, int]] | HerdError]:
        """Yield ``options.samples`` answers to each prompt, with their tokens (prompt included).

        An answer that did not end is empty. The error stands for a prompt that cannot be answered.
        """
        ...

    def most_tokens(self, messages: Sequence[Message], options: SynthOptions) -> int:
        """Return the most tokens that the answers to a prompt can take, with those of the prompt."""
        ...


class LocalTeacher:
    """A model of this machine, run by the engine."""

    def __init__(self, model: str) -> None:
        tokenizer = load_tokenizer(model)
        if tokenizer is None:
            raise DataError(f"{model}: has no tokenizer, and a teacher needs one")
        tokenizer.require_chat()
        self.name, self.hash = model, checkpoint_hash(model)
        self._tokenizer: Tokenizer = tokenizer
        self._engine = Engine(load_model(model), tokenizer, max_batch=AT_ONCE)

    def answers(
        self, prompts: Sequence[Sequence[Message]], options: SynthOptions
    ) -> Iterator[list[tuple[str, int]] | HerdError]:
        """See `AnswerTeacher`."""
        asked: list[list[EngineRequest] | HerdError] = []
        for messages in prompts:
            try:
                asked.append(self._requests(messages, options))
            except HerdError as error:
                asked.append(error)
        requests = [request for each in asked if isinstance(each, list) for request in each]
        told = iter(
            (
                completion.text if completion.finish_reason == "stop" else "",
                completion.prompt_tokens + len(completion.ids),
            )
            for completion in self._engine.run(requests)
        )
        for each in asked:
            yield list(islice(told, options.samples)) if isinstance(each, list) else each

    def most_tokens(self, messages: Sequence[Message], options: SynthOptions) -> int:
        """See `AnswerTeacher`."""
        try:
            request = self._requests(messages, options)[0]
        except HerdError:  # it will be refused
            return 0
        return options.samples * (len(request.prompt_ids) + options.max_tokens)

    def _requests(self, messages: Sequence[Message], options: SynthOptions) -> list[EngineRequest]:
        """Return a request for each sample of an answer. Raises a HerdError if it cannot be answered."""
        ids = self._tokenizer.require_chat().render(messages, generation_prompt=True).ids
        digest = hashlib.sha256(json.dumps([options.seed, ids]).encode()).digest()
        first = int.from_bytes(digest[:4], "little")
        sampling = Sampling(temperature=options.temperature, max_tokens=options.max_tokens)
        requests = [
            EngineRequest(ids, replace(sampling, seed=first + sample)) for sample in range(options.samples)
        ]
        self._engine.check(requests[0])
        return requests


class EndpointTeacher:
    """A model behind OpenAI's API at a URL."""

    def __init__(self, url: str, model: str | None) -> None:
        self._endpoint = EndpointModel(url, model)
        self.name, self.hash = f"{self._endpoint.url} {self._endpoint.name}", self._endpoint.hash

    def answers(
        self, prompts: Sequence[Sequence[Message]], options: SynthOptions
    ) -> Iterator[list[tuple[str, int]] | HerdError]:
        """See `AnswerTeacher`."""
        bodies = [
            {
                "messages": list(messages), "max_tokens": options.max_tokens,
                "temperature": options.temperature, "seed": options.seed + sample,
            }
            for messages in prompts
            for sample in range(options.samples)
        ]  # fmt: skip
        told = self._endpoint.chat_many(bodies)
        for _ in prompts:
            some = list(islice(told, options.samples))
            error = next((each for each in some if isinstance(each, HerdError)), None)
            answered = [("", 0) if isinstance(each, HerdError) else each for each in some]
            yield error if error is not None and not any(tokens for _, tokens in answered) else answered

    def most_tokens(self, messages: Sequence[Message], options: SynthOptions) -> int:
        """See `AnswerTeacher`. No tokenizer makes more tokens of a text than it has bytes."""
        text = json.dumps(messages, ensure_ascii=False).encode()
        return options.samples * (len(text) + TEMPLATE_TOKENS + options.max_tokens)


def open_teacher(model: str, name: str | None = None) -> AnswerTeacher:
    """Return the teacher that ``model`` names: a model of this machine, or the URL of an endpoint."""
    if model.startswith(("http://", "https://")):
        return EndpointTeacher(model, name)
    return LocalTeacher(model)
