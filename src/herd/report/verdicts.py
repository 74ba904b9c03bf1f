"""Say in sentences what the models of a run can do and what not: failed gates first, then what works.

The page and the terminal begin with these sentences.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..units import fixed
from .languages import language
from .run import Gate, ModelScore, Run

TOOLS_BAR = 0.7
"""Fraction of unseen English questions from which on the instruct model counts as able to call tools."""
NEEDLE_BAR = 0.6
"""Fraction of hidden facts from which on a context length counts as usable."""
_MEANING = {
    "copying": "The teacher does not copy reliably. Tools and hidden facts need it: expect little of them.",
    "needles": "Facts hidden in a text of this length are not found, so the context was not extended to it.",
    "short-context": "Extending the context made short texts worse, so it was not extended.",
}


@dataclass(frozen=True)
class Finding:
    """A sentence about the models of a run, and whether it is good news."""

    text: str
    good: bool


def findings(run: Run) -> list[Finding]:
    """Return the failed gates, then what works, then what does not."""
    failed = [gate for stage in run.stages for gate in stage.gates if not gate.passed]
    found = [finding for finding in (_tools(run), _needles(run), _student(run)) if finding]
    return [_gate(gate) for gate in failed] + sorted(found, key=lambda finding: not finding.good)


def _gate(gate: Gate) -> Finding:
    meaning = next((text for word, text in _MEANING.items() if gate.name.startswith(word)), "")
    numbers = ""
    if gate.unit == "fraction" and isinstance(gate.value, int | float) and isinstance(gate.bar, int | float):
        numbers = f" ({fixed(100 * gate.value, 0)} % of {fixed(100 * gate.bar, 0)} % needed)"
    return Finding(f"Gate not passed: {gate.name}{numbers}. {meaning}".strip(), False)


def _tools(run: Run) -> Finding | None:
    score = run.score("instruct", "tool_use")
    by_lang = score.detail.get("by_lang", {}) if score else {}
    if "en" not in by_lang:
        return None
    english = by_lang["en"].value
    others = {code: part.value for code, part in by_lang.items() if code != "en"}
    text = f"It answers {fixed(100 * english, 0)} % of new English questions with the right call and answer"
    if others:
        worst = min(others, key=lambda code: others[code])
        mean = sum(others.values()) / len(others)
        text += (
            f", and {fixed(100 * mean, 0)} % in {len(others)} other languages"
            f" (least in {language(worst)}: {fixed(100 * others[worst], 0)} %)"
        )
    return Finding(f"{text}.", english >= TOOLS_BAR)


def _needles(run: Run) -> Finding | None:
    longest: tuple[int, float] | None = None
    for model in ("long", "instruct"):
        score: ModelScore | None = run.score(model, "needle")
        lengths = {int(key): part.value for key, part in score.detail["by_length"].items()} if score else {}
        if lengths and (longest is None or max(lengths) >= longest[0]):
            longest = max((max(lengths), lengths[max(lengths)]), longest or (0, 0.0))
    if longest is None:
        return None
    length, value = longest
    share = f"{fixed(100 * value, 0)} %"
    return Finding(
        f"It finds {share} of the facts hidden in texts of {length:,} tokens.", value >= NEEDLE_BAR
    )


def _student(run: Run) -> Finding | None:
    score = run.score("student", "bpb_vs_control")
    student, parent = run.maker("student"), run.maker("instruct")
    if score is None or student is None or parent is None or not (student.n_params and parent.n_params):
        return None
    estimate = score.estimate
    size = f"{fixed(100 * student.n_params / parent.n_params, 0)} % of the size"
    if estimate.hi is not None and estimate.hi < 0:
        gained = f"needs {fixed(-estimate.value, 2)} bits per byte less for unseen text than its control"
        return Finding(f"The student, {size} of its teacher, {gained}, trained on the same tokens.", True)
    return Finding(f"The student, {size} of its teacher, is not shown to be better than its control.", False)
