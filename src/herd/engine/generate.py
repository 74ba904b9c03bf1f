"""Generate text from prompts with one call, without setting up an `Engine`.

A prompt is a text, which is continued after the beginning-of-text token, or a list of messages, which is
answered as the assistant. ``sampling`` are fields of `Sampling` (max_tokens=, temperature=, stop=,
logit_bias=, ...). Those that are not given are the model's own (`LlamaLM.sampling_defaults`), as in `herd
chat`: ``temperature=0`` gives the same text every time. A text is continued by 256 tokens, and an answer ends
where the model ends it, unless ``max_tokens`` says otherwise. ``constraint`` defines the form of the answer:
make one with `Constraint.json_schema`, `.regex` or `.lark`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from ..errors import EngineError
from ..llama.model import LlamaLM
from ..text import AnswerParser, Content, Tokenizer
from .constraint import Constraint
from .engine import Engine, ResponseStream
from .request import Completion, Request, Sampling

Prompt = str | Sequence[dict[str, Any]]


def generate(
    model: LlamaLM,
    tokenizer: Tokenizer,
    prompt: Prompt,
    *,
    tools: list[dict[str, Any]] | None = None,
    constraint: Constraint | None = None,
    **sampling: Any,
) -> str:
    """Return the text that follows ``prompt``."""
    return generate_many(model, tokenizer, [prompt], tools=tools, constraint=constraint, **sampling)[0].text


def generate_many(
    model: LlamaLM,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    *,
    n: int = 1,
    tools: list[dict[str, Any]] | None = None,
    constraint: Constraint | None = None,
    max_batch: int = 32,
    **sampling: Any,
) -> list[Completion]:
    """Return ``n`` completions of each prompt, in the order of the prompts. All are computed together."""
    engine = Engine(model, tokenizer, max_batch=max_batch)
    requests = [_request(model, tokenizer, prompt, tools, constraint, sampling) for prompt in prompts]
    streams = [(p, s) for p, r in zip(prompts, requests, strict=True) for s in engine.submit_many(r, n)]
    completions = [(prompt, stream.completion()) for prompt, stream in streams]
    return [
        replace(done, text=answer_parser(tokenizer, prompt).parse(done.text).content)
        for prompt, done in completions
    ]


def stream(
    model: LlamaLM,
    tokenizer: Tokenizer,
    prompt: Prompt,
    *,
    tools: list[dict[str, Any]] | None = None,
    constraint: Constraint | None = None,
    **sampling: Any,
) -> Iterator[str]:
    """Yield the text of `generate` in pieces. Leaving the loop early stops the generation."""
    request = _request(model, tokenizer, prompt, tools, constraint, sampling)
    return _pieces(Engine(model, tokenizer).submit(request), answer_parser(tokenizer, prompt))


def _request(
    model: LlamaLM, tokenizer: Tokenizer, prompt: Prompt, tools: list[dict[str, Any]] | None,
    constraint: Constraint | None, sampling: dict[str, Any],
) -> Request:  # fmt: skip
    own = dict(model.sampling_defaults) | ({} if isinstance(prompt, str) else {"max_tokens": None})
    return Request(encode_prompt(tokenizer, prompt, tools), Sampling(**own | sampling), constraint=constraint)


def _pieces(deltas: ResponseStream, parser: AnswerParser) -> Iterator[str]:
    try:
        for delta in deltas:
            yield from (event.text for event in parser.feed(delta.text) if isinstance(event, Content))
        yield from (event.text for event in parser.finish() if isinstance(event, Content))
    finally:
        deltas.cancel()


def answer_parser(tokenizer: Tokenizer, prompt: Prompt) -> AnswerParser:
    """Return the parser that removes a model's reasoning from its answer. Continued text has none."""
    return AnswerParser() if isinstance(prompt, str) else tokenizer.require_chat().parser()


def encode_prompt(
    tokenizer: Tokenizer | None, prompt: Prompt, tools: list[dict[str, Any]] | None = None
) -> list[int]:
    """Return the ids of a text with the beginning-of-text token, or of messages up to the next answer."""
    if tokenizer is None:
        raise EngineError(
            "this model has no tokenizer: put its tokenizer.model or tokenizer.json into the model's folder"
        )
    if isinstance(prompt, str):
        if tools:
            raise EngineError("tools need a list of messages: a text prompt is only continued")
        return tokenizer.encode(prompt, bos=True)
    chat = tokenizer.require_chat()
    return chat.render(list(prompt), tools=tools, generation_prompt=True).ids
