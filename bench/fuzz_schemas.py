"""Draw random JSON schemas, answer each at random under its constraint, and let jsonschema judge every answer.

    python bench/fuzz_schemas.py [--n 2000] [--commit]

Each schema is built from the keywords that people use (types, bounds, enum and const, nested objects and arrays,
anyOf, oneOf, allOf, $ref, patterns, formats). Three answers are drawn per schema, token by token, among the tokens
that the constraint allows. A schema is either refused in one line, or each finished answer must be valid.
"""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Callable
from decimal import Decimal
from typing import Any

from common import bench_parser, exactly, save_receipt
from herd.engine.constraint import Constraint, Guide
from herd.errors import EngineError
from herd.text import Tokenizer
from herd.text.ranks_tokenizer import RanksTokenizer

SEED = 20_261_127
MAX_TOKENS = 400
"""Bytes of an answer. An answer that is longer is not judged: any prefix may still become valid."""
ANSWERS = 3
WORDS = ("name", "age", "city", "a/b", "x~y", "naïve", "日本", "", "$ref", "type", "enum")
PATTERNS = ("^[a-z]{1,8}$", "[0-9]+", "^(red|green)-\\d{2}$", "^\\w+@\\w+\\.com$", "a.c")
FORMATS = ("date", "time", "date-time", "email", "ipv4", "uuid")

Schema = dict[str, Any]


def main() -> None:
    parser = bench_parser(__doc__)
    parser.add_argument("--n", type=int, default=2000, help="number of schemas")
    args = parser.parse_args()
    outcomes, refusals, slowest = Counter[str](), Counter[str](), 0.0
    tokenizer = byte_tokenizer()
    for number in range(args.n):
        rng = random.Random(f"{SEED} {number}")
        schema = random_schema(rng)
        start = time.perf_counter()
        for outcome, detail in judge(schema, rng, tokenizer):
            outcomes[outcome] += 1
            if outcome == "refused":
                refusals[" ".join(detail.split()[:16])] += 1
            if outcome == "invalid":
                print(
                    f"schema {number}: {json.dumps(schema, ensure_ascii=False)}\n  answer: {detail}",
                    flush=True,
                )
        slowest = max(slowest, time.perf_counter() - start)
    for reason, count in refusals.most_common(12):
        print(f"refused {count:5} times: {reason}")
    save_receipt(
        "fuzz-schemas",
        what=f"{args.n} random JSON schemas, {ANSWERS} random answers each, judged by jsonschema",
        values={
            "invalid answers": exactly(0, outcomes["invalid"], "answers"),
            "valid answers": (outcomes["valid"], "answers"),
            f"answers longer than {MAX_TOKENS} bytes, not judged": (outcomes["long"], "answers"),
            "dead ends": (outcomes["dead end"], "answers"),
            "schemas refused in one line": (outcomes["refused"], "schemas"),
            "slowest schema": (round(slowest, 2), "s"),
        },
        seed=SEED,
    )


def byte_tokenizer() -> RanksTokenizer:
    """Return a tokenizer of the 256 bytes and the special tokens of Llama 3.1."""
    return RanksTokenizer({bytes([byte]): byte for byte in range(256)})


def judge(schema: Schema, rng: random.Random, tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """Return the outcome of each answer and its text: valid, invalid, long or dead end. Or one refusal."""
    from jsonschema import Draft202012Validator

    # Decimals on both sides: jsonschema would compare and divide in floats.
    exact = json.loads(json.dumps(schema), parse_float=Decimal)
    validator = Draft202012Validator(exact, format_checker=Draft202012Validator.FORMAT_CHECKER)
    try:
        answers = [
            answer(Guide(Constraint.json_schema(schema), tokenizer), rng, tokenizer) for _ in range(ANSWERS)
        ]
    except EngineError as error:
        return [("invalid" if "\n" in str(error) else "refused", str(error))]
    outcomes = []
    for text in answers:
        if text is None:
            outcomes.append(("long", ""))
        else:
            value = json.loads(text, parse_float=Decimal)
            outcomes.append(("valid" if validator.is_valid(value) else "invalid", text))
    return outcomes


def answer(guide: Guide, rng: random.Random, tokenizer: Tokenizer) -> str | None:
    """Return random text that ``guide`` allows, preferring to end. None if it became too long."""
    content = bytearray()
    for _ in range(MAX_TOKENS):
        if guide.complete:
            return content.decode()
        allowed = set(guide.allowed().nonzero().flatten().tolist())
        following = sorted(allowed - tokenizer.stop_ids)
        if len(following) < len(allowed) and (not following or rng.random() < 0.3):
            return content.decode()
        closing = [token for token in following if token in b'"]},:']
        token = rng.choice(closing if closing and rng.random() < 0.5 else following)
        guide.push([token])
        content.append(token)
    return None


def random_schema(rng: random.Random) -> Schema:
    """Return a schema with a few definitions that its parts refer to."""
    definitions = {"leaf": leaf(rng), "node": object_of(rng, 1)}
    schema = part(rng, 3)
    return schema | {"$defs": definitions}


def part(rng: random.Random, depth: int) -> Schema:
    """Return a random schema of at most ``depth`` more levels."""
    makers: list[Callable[[random.Random, int], Schema]] = [object_of, array_of, combined]
    if depth == 0 or rng.random() < 0.35:
        return leaf(rng)
    if rng.random() < 0.1:
        return {"$ref": rng.choice(("#/$defs/leaf", "#/$defs/node"))}
    return rng.choice(makers)(rng, depth - 1)


def leaf(rng: random.Random) -> Schema:
    """Return a schema without parts."""
    kind = rng.choice(
        ("string", "pattern", "format", "integer", "number", "enum", "const", "type", "types", "any")
    )
    if kind == "string":
        low = rng.randint(0, 4)
        return {"type": "string"} | maybe(rng, minLength=low, maxLength=low + rng.randint(0, 6))
    if kind == "pattern":
        return {"type": "string", "pattern": rng.choice(PATTERNS)}
    if kind == "format":
        return {"type": "string", "format": rng.choice(FORMATS)}
    if kind in ("integer", "number"):
        return number_of(rng, kind)
    if kind == "enum":
        return {"enum": [value(rng) for _ in range(rng.randint(1, 4))]}
    if kind == "const":
        return {"const": value(rng)}
    if kind == "types":
        return {"type": rng.sample(("string", "integer", "boolean", "null"), 2)}
    return {"type": rng.choice(("boolean", "null", "integer"))} if kind == "type" else {}


def number_of(rng: random.Random, kind: str) -> Schema:
    """Return a schema of numbers with bounds of every kind."""
    low = rng.choice((rng.randint(-50, 50), rng.randint(-(10**9), 10**9), round(rng.uniform(-5, 5), 2)))
    high = low + rng.choice((0, 1, 2.5, 10, 1000))
    bounds = {
        rng.choice(("minimum", "exclusiveMinimum")): low,
        rng.choice(("maximum", "exclusiveMaximum")): round(high, 2),
        "multipleOf": rng.choice((1, 2, 3, 7, 0.5, 0.01)),
    }
    return {"type": kind} | maybe(rng, **bounds)


def object_of(rng: random.Random, depth: int) -> Schema:
    """Return a schema of objects."""
    names = rng.sample(WORDS, rng.randint(0, 4))
    extra: Schema = {
        "required": [name for name in names if rng.random() < 0.6],
        "additionalProperties": rng.choice((False, True, leaf(rng))),
        "minProperties": rng.randint(0, 2),
        "maxProperties": rng.randint(2, 5),
    }
    properties = {name: part(rng, depth) for name in names}
    return {"type": "object", "properties": properties} | maybe(rng, **extra)


def array_of(rng: random.Random, depth: int) -> Schema:
    """Return a schema of arrays."""
    low = rng.randint(0, 2)
    extra: Schema = {
        "items": part(rng, depth),
        "prefixItems": [part(rng, depth) for _ in range(rng.randint(1, 2))],
        "minItems": low,
        "maxItems": low + rng.randint(0, 3),
    }
    unsupported = {"uniqueItems": True, "contains": leaf(rng)} if rng.random() < 0.1 else {}
    return {"type": "array"} | maybe(rng, **extra, **unsupported)


def combined(rng: random.Random, depth: int) -> Schema:
    """Return a choice or a conjunction of schemas."""
    key = rng.choice(("anyOf", "anyOf", "oneOf", "allOf"))
    return {key: [part(rng, depth) for _ in range(rng.randint(1, 3))]}


def value(rng: random.Random) -> Any:
    """Return a constant."""
    if rng.random() < 0.03:
        return rng.choice((2**63, 1e300, 1.0000000000000001e-20))
    numbers: tuple[Any, ...] = (
        rng.randint(-9, 9),
        rng.randint(-(2**53), 2**53),
        round(rng.uniform(-3, 3), 3),
    )
    return rng.choice((*numbers, *WORDS, True, False, None, [], [1, "a"], {"k": [None]}, 'q"\\\n'))


def maybe(rng: random.Random, **keywords: Any) -> Schema:
    """Return about half of the keywords."""
    return {key: keyword for key, keyword in keywords.items() if rng.random() < 0.5}


if __name__ == "__main__":
    main()
