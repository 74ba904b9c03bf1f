"""Compare a pruned and distilled student with its control, over seeds, at equal tokens and at equal FLOPs.

    python bench/students.py runs/full          # about 15 minutes on two cores

Uses the teacher, the shards and the plan of a finished `herd raise`. For each seed (data order, dialogs and
random weights) three arms of the same architecture are trained with the same settings:

* student: pruned from the instruct model by importance, trained with forward KL on its logits;
* control: random weights, cross-entropy, the same tokens in the same order;
* control at equal FLOPs: the same with the additional tokens that the student's teacher forwards would pay
for.

Bits per byte on held-out text are compared, paired by document; the interval resamples the documents of all
seeds. Finished arms are kept in the run's folder, so the command can be interrupted and resumed.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np

from common import bench_parser, save_receipt
from herd.checkpoint import Lineage, load_model, save_model
from herd.distill import prune
from herd.evals.bootstrap import paired_difference
from herd.evals.bpb import compression
from herd.evals.windows import HeldOut
from herd.files import write_json
from herd.kernels.memory import keep_freed_memory
from herd.life.learn import config_of
from herd.life.material import STUDENT_SEED, RaiseData
from herd.life.measure import heldout
from herd.life.plan import Phase
from herd.life.run import RaiseRun
from herd.life.stages import fitted, random_model, student_config
from herd.report.receipt import Value
from herd.train import distil, lm, train


def run_arm(folder: Path, arm: str, material: RaiseData, phase: Phase, documents: list[HeldOut]) -> dict:
    """Train one arm, measure it, and keep the result in ``folder``."""
    seed = material.plan.seed
    result = folder / f"{arm}-{seed}.json"
    if result.exists():
        return json.loads(result.read_text())
    teacher = load_model(material.folder / "instruct").requires_grad_(False).eval()
    target = student_config(material.plan.student_config, teacher.config)
    stream = material.student(phase.context)
    if arm == "student":
        model, _ = prune(teacher, target, [stream.batch(0, 8), stream.batch(8, 8)])
        objective = distil(teacher)
    else:
        model, objective = random_model(target, seed + 1), lm
    work = folder / f"{arm}-{seed}"
    config = config_of(phase, material.plan).model_copy(update={"eval_every": 0})
    trained = train(model, stream, objective, config, work)
    scored = compression(model.eval(), documents)
    save_model(
        folder / f"{arm}-{seed}-model", model, material.tokenizer, lineage=Lineage(name=arm, stage=arm)
    )
    record = {
        "bits": scored.bits.tolist(),
        "n_bytes": scored.n_bytes.tolist(),
        "tokens": trained.tokens,
        "flops": trained.flops,
        "seconds": trained.seconds,
    }
    write_json(result, record)
    shutil.rmtree(work)
    return record


def main() -> None:
    parser = bench_parser(__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    keep_freed_memory()
    plan = RaiseRun.saved_plan(options.run)
    folder = options.run / "students-bench"
    folder.mkdir(exist_ok=True)
    teacher = load_model(options.run / "instruct").config
    target = student_config(plan.student_config, teacher)
    phase = fitted(plan.distil, teacher)
    own = target.flops_per_token(phase.context / 2, training=True)
    factor = 1 + teacher.flops_per_token(phase.context / 2) / own
    longer = phase.model_copy(update={"steps": round(phase.steps * factor)})

    arms: dict[str, list[dict]] = {"student": [], "control": [], "control-flops": []}
    for seed in range(options.seeds):
        seeded = plan.model_copy(update={"seed": plan.seed + seed * 10 * STUDENT_SEED})
        material = RaiseData(seeded, options.run)
        documents = heldout(material)
        for arm, its_phase in (("student", phase), ("control", phase), ("control-flops", longer)):
            record = run_arm(folder, arm, material, its_phase, documents)
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
        commit=options.commit,
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
