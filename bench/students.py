"""Compare a pruned and distilled student with its control, over seeds, at equal tokens and at equal FLOPs.

    python bench/students.py runs/full          # about 15 minutes on two cores

Uses the teacher, the shards and the plan of a finished `herd raise`. For each seed (data order, dialogs and
random weights) three arms of the same architecture are trained with the same settings:

* student: pruned from the instruct model by importance, trained with forward KL on its logits;
* control: random weights, cross-entropy, the same tokens in the same order;
* control at equal FLOPs: the same with the additional tokens that the student's teacher forwards would pay
for.

Bits per byte on held-out text are compared, paired by document. The interval resamples the documents of all
seeds. Finished arms are kept in the run's folder, so the command can be interrupted and resumed.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import yaml

from common import bench_parser, save_receipt
from herd.checkpoint import load_model
from herd.evals.bootstrap import paired_difference
from herd.evals.bpb import compression
from herd.evals.windows import HeldOut
from herd.files import write_json
from herd.life.data import RunData
from herd.life.measure import heldout
from herd.life.recipes import STUDENT_SEED
from herd.life.run import RaiseRun
from herd.report.receipt import Value
from herd.train.recipe import parse_recipe
from herd.train.run import run_recipe


def run_arm(run: Path, arm: str, seed: int, factor: float, documents: list[HeldOut]) -> dict:
    """Train one arm by its stage's recipe with another seed, measure it, and keep the result.

    ``factor`` multiplies the steps.
    """
    out = run / "students-bench" / f"{arm}-{seed}"
    result = out.with_suffix(".json")
    if result.exists():
        return json.loads(result.read_text())
    stage = "student" if arm == "student" else "control"
    content = yaml.safe_load((run / "stages" / stage / "recipe.yaml").read_text())
    content["train"] |= {"seed": seed, "eval_every": 0}
    content["train"]["steps"] = round(content["train"]["steps"] * factor)
    content |= {"name": f"{arm}-{seed}", "out": str(out)}
    checkpoint, trained = run_recipe(parse_recipe(yaml.safe_dump(content)))
    scored = compression(load_model(checkpoint).eval(), documents)
    record = {
        "bits": scored.bits.tolist(),
        "n_bytes": scored.n_bytes.tolist(),
        "tokens": trained.tokens,
        "flops": trained.flops,
        "seconds": trained.seconds,
    }
    write_json(result, record)
    shutil.rmtree(out / "state")
    return record


def main() -> None:
    parser = bench_parser(__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    plan = RaiseRun.saved_plan(options.run)
    teacher, target = (load_model(options.run / name).config for name in ("instruct", "student"))
    context = plan.stage("student").phases[-1].context
    own = target.flops_per_token(context / 2, training=True)
    factor = 1 + teacher.flops_per_token(context / 2) / own
    documents = heldout(RunData(plan, options.run))

    arms: dict[str, list[dict]] = {"student": [], "control": [], "control-flops": []}
    for number in range(options.seeds):
        seed = plan.seed + (1 + 10 * number) * STUDENT_SEED
        for arm, steps in (("student", 1.0), ("control", 1.0), ("control-flops", factor)):
            record = run_arm(options.run, arm, seed, steps, documents)
            arms[arm].append(record)
            bpb = sum(record["bits"]) / sum(record["n_bytes"])
            print(f"seed {seed} {arm}: {bpb:.4f} bits/byte, {record['tokens']:,} tokens", flush=True)

    def joined(arm: str, key: str) -> np.ndarray:
        return np.concatenate([np.asarray(record[key]) for record in arms[arm]])

    def gap(arm: str) -> Value:
        interval = paired_difference(
            joined("student", "bits"), joined(arm, "bits"), joined(arm, "n_bytes"), seed=0
        )
        bar = {"bar": "< 0, interval without 0", "passed": interval.hi < 0} if arm == "control" else {}
        return Value(interval.value, "bits/byte", lo=interval.lo, hi=interval.hi, **bar)

    def mean(arm: str) -> Value:
        return Value(float(joined(arm, "bits").sum() / joined(arm, "n_bytes").sum()), "bits/byte")

    save_receipt(
        "students",
        what=f"pruned and distilled student against its control, {options.seeds} seeds, held-out text",
        values={
            "gap_at_equal_tokens": gap("control"),
            "gap_at_equal_flops": gap("control-flops"),
            **{f"{arm}_bpb": mean(arm) for arm in arms},
            "tokens": Value(arms["student"][0]["tokens"], "tokens"),
            "tokens_at_equal_flops": Value(arms["control-flops"][0]["tokens"], "tokens"),
            "student_params": Value(target.n_params, "parameters"),
            "teacher_params": Value(teacher.n_params, "parameters"),
        },
        seed=plan.seed,
        notes="Equal FLOPs charge the teacher's forwards to the student, not the teacher's own training.",
    )


if __name__ == "__main__":
    main()
