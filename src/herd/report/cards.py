"""Make the cards at the top of the report page: the few numbers that a reader wants first."""

from __future__ import annotations

from dataclasses import dataclass

from ..units import duration, fixed, format_value, si, unit_name
from .palette import tone
from .run import Estimate, ModelScore, Run
from .tabulate import interval, metric, total


@dataclass(frozen=True)
class Card:
    """A number with its caption.

    ``verdict`` is (a word, whether it is good) if there was a condition to meet.
    """

    title: str
    tone: str
    value: str
    unit: str
    interval: str
    caption: str
    verdict: tuple[str, bool] | None = None


def cards(run: Run) -> list[Card]:
    """Return a card for each of the main results that was measured."""
    text = "Bits the teacher needs to encode a byte of text it has never seen. Less is better."
    teacher = _score_card(run, "teacher", "bpb", "Teacher", text)
    text = "Functions the model wrote that pass their tests in the sandbox."
    code = _score_card(run, "instruct", "code_pass", "Code", text)
    found = [teacher, _student_vs_control(run), _fidelity(run), _needle(run), _tools(run), code]
    return [card for card in [*found, _gates(run), _time(run)] if card]


def _score_card(
    run: Run, model: str, name: str, title: str, caption: str, part: Estimate | None = None
) -> Card | None:
    score = run.score(model, name)
    if score is None:
        return None
    shown, decimals = part or score.estimate, metric(name).decimals
    return Card(
        title, tone(model), format_value(shown.value, score.unit, decimals), unit_name(score.unit),
        interval(shown, score.unit, decimals), caption,
    )  # fmt: skip


def _student_vs_control(run: Run) -> Card | None:
    for score in run.scores:
        kind, _, rival = score.name.partition("_vs_")
        if rival and score.model == "student":
            lower, shown = metric(kind).better == "lower", score.estimate
            title = f"Student vs {rival}"
            better = shown.value < 0 if lower else shown.value > 0
            certain = shown.lo is not None and shown.hi is not None and (shown.hi < 0 or shown.lo > 0)
            word = ("better" if better else "worse") if certain else "not shown"
            caption = "Paired difference on the same held-out text, after training on the same tokens."
            sign = "+" if shown.value > 0 else ""
            return Card(
                title, "student", sign + format_value(shown.value, score.unit, 3), unit_name(score.unit),
                interval(shown, score.unit, 3), caption, (word, better and certain),
            )  # fmt: skip
    return None


def _fidelity(run: Run) -> Card | None:
    caption = "How often the student’s most likely next token is also its teacher’s."
    student, teacher = run.maker("student"), run.maker("instruct") or run.maker("teacher")
    if student and teacher and student.n_params and teacher.n_params:
        caption += f" It has {fixed(100 * student.n_params / teacher.n_params, 0)} % of its parameters."
    return _score_card(run, "student", "top1", "Agreement", caption)


def _needle(run: Run) -> Card | None:
    best: tuple[int, str, ModelScore] | None = None
    for model in run.models:
        score = run.score(model, "needle")
        lengths = [int(key) for key in score.detail.get("by_length", {}) if key.isdigit()] if score else []
        shape = stage.config if (stage := run.maker(model)) else {}
        context = int(shape.get("max_position_embeddings") or 0)
        reach = max((length for length in lengths if not context or length <= context), default=0)
        if score and reach and (best is None or reach > best[0]):
            best = (reach, model, score)
    if best is None:
        return None
    length, model, score = best
    caption = f"Facts hidden in {length:,} tokens of other text that the model “{model}” finds."
    return _score_card(run, model, "needle", "Long context", caption, score.detail["by_length"][str(length)])


def _tools(run: Run) -> Card | None:
    score = run.score("instruct", "tool_use")
    part = score.detail.get("by_lang", {}).get("en") if score else None
    words = "English questions" if part else "questions"
    caption = f"Unseen {words} where the tool call computes the right value and the answer states it."
    return _score_card(run, "instruct", "tool_use", "Tool use", caption, part)


def _gates(run: Run) -> Card | None:
    gates = [gate for stage in run.stages for gate in stage.gates]
    if not gates:
        return None
    passed = sum(gate.passed for gate in gates)
    failed = [gate.name for gate in gates if not gate.passed]
    caption = "Every stage passed its gates." if not failed else f"Not passed: {', '.join(failed)}."
    verdict = ("not all", False) if failed else ("all", True)
    return Card("Gates", "none", f"{passed} of {len(gates)}", "passed", "", caption, verdict)


def _time(run: Run) -> Card | None:
    seconds, predicted = total(run.stages, "seconds"), total(run.stages, "predicted_seconds")
    if not seconds:
        return None
    said = f"Predicted: {duration(predicted)}." if predicted else "No prediction was recorded."
    flops = total(run.stages, "flops")
    said += f" {si(flops, 'FLOP')} in all." if flops else ""
    return Card("Time", "none", duration(seconds), "", "", said)
