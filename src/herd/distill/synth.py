"""Make training data with a teacher: prompts, answers, verification, removal of near-duplicates, shards.

Every prompt ends as a line of ``journal.jsonl`` (its answers, which were accepted and why not, and tokens),
which is flushed as soon as its answers are there. So a killed run loses at most the answers that were being
written, and the same command continues. A prompt that the teacher refuses (it is too long) is left out with
the reason, and asked again at the next start. When all prompts are done or the budget is spent, accepted
answers become shards of dialogs, each line with its provenance. Idea and constants: Llama 3.1 (paper, section
4.3): rejection sampling with execution feedback, and back-translation.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ..data.near_duplicates import NearDuplicates
from ..data.read_dialogs import exchange
from ..data.rows import read_rows
from ..data.sources import Document
from ..errors import DataError, HerdError, StorageError
from ..evals.tasks.json_schema import check_schema
from ..files import require_own, whole_folder, write_json
from ..machine import lock_folder
from ..tools import Sandbox
from .teachers import AnswerTeacher, Message, SynthOptions
from .verify import verify, wanted_answer

JOURNAL, OPTIONS = "journal.jsonl", "options.json"
CHECKS = ("tests", "expression", "answer", "schema")
"""Fields of a prompt that verify its answer."""
SHARD_LINES = 10_000
PASSAGE = 1_200
"""Characters of a document's passage for back-translation."""
ASK = "Write one question that the following text answers. Write only the question.\n\n"
T = TypeVar("T")


@dataclass(frozen=True)
class SeedPrompt:
    """A question, its location, and the check of its answer. ``passage``: the text to make a question for."""

    where: str
    messages: list[Message]
    check: dict[str, Any]
    passage: str = ""


@dataclass
class Synthesized:
    """The outcome: counts of answers by verdict and method, and the shards if all is done.

    ``reasons`` counts why answers of each method were rejected, and ``refused`` has a line for each prompt
    that the teacher refused.
    """

    n_prompts: int
    n_done: int
    tokens: int
    usd: float
    accepted: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)
    reasons: dict[str, Counter[str]] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    n_duplicates: int = 0
    n_lines: int = 0
    shards: list[Path] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        """Whether every prompt was answered or refused."""
        return self.n_done + len(self.refused) == self.n_prompts


def read_prompts(path: Path) -> list[SeedPrompt]:
    """Read rows with ``prompt`` or ``messages``, and perhaps the fields of a check (`CHECKS`)."""
    prompts = []
    for row in read_rows(path, str(path)):
        fields = row.value if isinstance(row.value, dict) else {"prompt": row.value}
        messages = fields.get("messages") or fields.get("prompt")
        if isinstance(messages, str):
            messages = exchange(messages, "")[:1]
        if not isinstance(messages, list) or not messages:
            raise DataError(f"{row.where}: no prompt; give an object with prompt or messages")
        if not all(isinstance(message, dict) and "role" in message for message in messages):
            raise DataError(f"{row.where}: messages must be objects with role and content")
        try:
            json.dumps(messages, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise DataError(f"{row.where}: half a surrogate pair; repair the text") from None
        if messages[-1]["role"] == "assistant":
            raise DataError(f"{row.where}: ends with an answer; end with the question to the teacher")
        try:
            prompts.append(SeedPrompt(row.where, messages, _check_of(fields)))
        except DataError as error:
            raise DataError(f"{row.where}: {error}") from None
    return prompts


def _check_of(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that verify an answer. Raises DataError for a schema or expression without sense."""
    check = {name: fields[name] for name in CHECKS if fields.get(name) not in (None, "", [], {})}
    if isinstance(tests := check.get("tests"), list):
        check["tests"] = "\n".join(map(str, tests))
    elif tests is not None and not isinstance(tests, str):
        raise DataError("tests must be Python asserts, as one text or a list of texts")
    if "schema" in check:
        check_schema(check["schema"])
    if "expression" in check:
        wanted_answer(check)
    return check


def prompts_from_documents(documents: Sequence[Document]) -> list[SeedPrompt]:
    """Return prompts that ask for the question to each passage of documents (back-translation)."""
    prompts = []
    for document in documents:
        for start in range(0, max(1, len(document.text) - PASSAGE // 2), PASSAGE):
            passage = document.text[start : start + PASSAGE].strip()
            where = f"{document.source} at character {start}"
            prompts.append(SeedPrompt(where, exchange(ASK + passage, "")[:1], {}, passage))
    return prompts


def synthesize(
    prompts: Sequence[SeedPrompt],
    teacher: AnswerTeacher,
    out: Path,
    options: SynthOptions,
    progress: Callable[[int, int], None] | None = None,
) -> Synthesized:
    """Answer all prompts that the journal in ``out`` does not have yet, and write the shards.

    Raises `DataError` if ``out`` has the work of other prompts, another teacher or other options.
    """
    if not prompts:
        raise DataError("there is no prompt to answer")
    require_own(out, OPTIONS, (JOURNAL, "shards"))
    with lock_folder(out):
        journal = out / JOURNAL
        done = _read_journal(journal)
        _bind(out, prompts, teacher, options, begun=bool(done))
        try:
            refused = _answer_others(prompts, teacher, journal, options, done, progress)
        except OSError as error:
            why = f"cannot be written ({error.strerror}); free some space, and the same command continues"
            raise StorageError(f"{journal}: {why}") from error
        return _write_shards(prompts, teacher, out, options, done, refused)


def _answer_others(
    prompts: Sequence[SeedPrompt],
    teacher: AnswerTeacher,
    journal: Path,
    options: SynthOptions,
    done: dict[int, dict[str, Any]],
    progress: Callable[[int, int], None] | None,
) -> list[str]:
    """Answer the prompts that are not ``done``, within the budget. Return a line for each refused prompt."""
    tokens = sum(record["tokens"] for record in done.values())
    waiting = [number for number in range(len(prompts)) if number not in done]
    refused: list[str] = []
    with Sandbox() as sandbox, journal.open("a", encoding="utf-8") as file:
        while numbers := list(_affordable(waiting[: options.at_once], prompts, teacher, options, tokens)):
            waiting = waiting[len(numbers) :]
            asked = teacher.answers([prompts[number].messages for number in numbers], options)
            for number, answers in zip(numbers, asked, strict=True):
                if isinstance(answers, HerdError):
                    refused.append(f"{prompts[number].where}: {answers}")
                    continue
                record = _judged(number, prompts[number], answers, sandbox, options)
                tokens += record["tokens"]
                done[number] = record
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
                if options.limited and not tokens:
                    raise DataError(f"{teacher.name}: does not count tokens (usage), so no budget holds")
            if refused and not done:
                raise DataError(refused[0])
            if progress is not None:
                progress(len(done) + len(refused), len(prompts))
    if waiting and not done:
        most = teacher.most_tokens(prompts[waiting[0]].messages, options)
        raise DataError(
            f"{prompts[waiting[0]].where}: may take {most:,} tokens, more than the budget; raise it, or "
            "lower --max-tokens"
        )
    return refused


def _affordable(
    numbers: Sequence[int],
    prompts: Sequence[SeedPrompt],
    teacher: AnswerTeacher,
    options: SynthOptions,
    tokens: int,
) -> Iterator[int]:
    """Yield the first prompts whose answers stay within the budget, however long, after ``tokens``."""
    for number in numbers:
        if options.limited:
            tokens += teacher.most_tokens(prompts[number].messages, options)
            if not options.affords(tokens):
                return
        yield number


def _judged(
    number: int,
    prompt: SeedPrompt,
    answers: Sequence[tuple[str, int]],
    sandbox: Sandbox,
    options: SynthOptions,
) -> dict[str, Any]:
    texts = [text for text, _ in answers]
    verdicts = verify(prompt.check, texts, sandbox, options.agree) if not prompt.passage else None
    judged = []
    for position, text in enumerate(texts):
        if verdicts is None:  # a question that was made for a passage
            question = text.strip()
            good = question.endswith(("?", "？")) and "\n" not in question
            judged.append([text, good, "back-translation", "" if good else "not one question"])
        else:
            verdict = verdicts[position]
            why = verdict.why if text else f"not ended within {options.max_tokens} tokens"
            judged.append([text, verdict.accepted, verdict.method, why])
    return {"prompt": number, "tokens": sum(n for _, n in answers), "answers": judged}


def _bind(
    out: Path, prompts: Sequence[SeedPrompt], teacher: AnswerTeacher, options: SynthOptions, *, begun: bool
) -> None:
    """Record what the work in ``out`` depends on, or compare it if it has ``begun``, i.e. has an answer.

    Budgets may change between starts.
    """
    digest = hashlib.sha256(json.dumps([[p.messages, p.check] for p in prompts]).encode()).hexdigest()
    own = {name: value for name, value in vars(options).items() if not name.startswith(("budget", "usd"))}
    now = {"prompts (SHA-256)": digest, "teacher": teacher.name, "teacher (hash)": teacher.hash, **own}
    path = out / OPTIONS
    then = json.loads(path.read_text(encoding="utf-8")) if path.exists() else now
    if "teacher (hash)" not in then:
        raise DataError(f"{path}: is not from herd synth; give another --out")
    if not begun:
        write_json(path, now)
        return
    for name, value in now.items():
        if then.get(name) != value:
            raise DataError(
                f"{out} was made with {name}={then.get(name)!r}, not {value!r}: use another --out"
            )


def _read_journal(path: Path) -> dict[int, dict[str, Any]]:
    """Return the records by prompt. A line that a kill has cut off is removed from the file."""
    done: dict[int, dict[str, Any]] = {}
    if not path.exists():
        return done
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    for line in whole.decode("utf-8").split("\n")[:-1]:  # an answer may have other line ends
        record = json.loads(line)
        done[record["prompt"]] = record
    return done


def _write_shards(
    prompts: Sequence[SeedPrompt],
    teacher: AnswerTeacher,
    out: Path,
    options: SynthOptions,
    done: Mapping[int, dict[str, Any]],
    refused: list[str],
) -> Synthesized:
    tokens = sum(record["tokens"] for record in done.values())
    found = Synthesized(len(prompts), len(done), tokens, options.spent(tokens), refused=refused)
    seen = NearDuplicates(options.similarity)
    lines: list[str] = []
    for number in sorted(done):
        prompt = prompts[number]
        for sample, (text, accepted, method, why) in enumerate(done[number]["answers"]):
            (found.accepted if accepted else found.rejected)[method] += 1
            if not accepted:
                found.reasons.setdefault(method, Counter())[why] += 1
                continue
            question = [*prompt.messages] if not prompt.passage else exchange(text.strip(), "")[:1]
            answer = text if not prompt.passage else prompt.passage
            if seen.add(" ".join([*(str(m.get("content")) for m in question), answer])):
                found.n_duplicates += 1
                continue
            provenance = {
                "prompt": prompt.where, "sample": sample, "teacher": teacher.name, 
                "teacher_hash": teacher.hash, "verified": method, "temperature": options.temperature,
                "seed": options.seed,
            }  # fmt: skip
            messages = [*question, {"role": "assistant", "content": answer}]
            lines.append(json.dumps({"messages": messages, "provenance": provenance}, ensure_ascii=False))
    found.n_lines = len(lines)
    with whole_folder(out / "shards") as temporary:
        for shard, some in enumerate(_parts(lines, SHARD_LINES)):
            path = temporary / f"{shard:05}.jsonl"
            text = "".join(line + "\n" for line in some)  # names of files may have any encoding
            path.write_text(text, encoding="utf-8", errors="backslashreplace")
    found.shards = sorted((out / "shards").glob("*.jsonl"))
    return found


def _parts(items: list[T], size: int) -> list[list[T]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
