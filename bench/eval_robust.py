"""Check that an evaluation survives hostile answers and kill -9.

    python bench/eval_robust.py             # 20 kills, about 4 minutes on two cores

Hostile programs (a fork bomb, endless loops, endless memory, ten megabytes in a line, NUL,
files written, deleted and read, the network, killing the parent: tests/evals/hostile.py) are given to
HumanEval and MBPP as the answers of a base and of an instruct model. Each must count as a failure, and the
machine must be unchanged: no file made, lost or left over, no process still running, nothing received at the
port.

`herd eval` of a small random checkpoint is also killed (SIGKILL to the whole process group) at moments drawn
uniformly over its length, started again until it is done, and compared with an undisturbed one: the scores
must be the same, and every item must be in its file once.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import sys
import tempfile
import time
from pathlib import Path

from common import at_least, bench_parser, exactly, run_quietly, save_receipt
from herd import checkpoint
from herd.checkpoint import Lineage
from herd.data.builtin import read_parallel
from herd.evals.results import read_evaluation
from herd.evals.tasks import Data, make_task
from herd.llama import ModelConfig
from herd.llama.model import LlamaLM
from herd.report.receipt import Value
from herd.text.tokenizer import Tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "evals"))
import hostile

TASKS = (
    "boolq,gsm8k,hellaswag,human_eval,openbookqa,piqa,social_iqa,truthfulqa_mc1,winogrande,ifeval,tool_calls"
)


def main() -> None:
    parser = bench_parser(__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="herd-robust-"))
    try:
        values = hostile_answers(folder) | killed(folder, options.kills, random.Random(options.seed))
    finally:
        shutil.rmtree(folder)
    save_receipt(
        "eval-robust",
        what="herd eval with hostile answers, and killed with kill -9 and resumed",
        values=values,
        seed=options.seed,
        notes=f"hostile: {', '.join(hostile.PROGRAMS)}; killed: the ten built-in items of "
        f"{TASKS.replace(',', ', ')}",
    )


def hostile_answers(folder: Path) -> dict[str, Value]:
    """Judge every program as an answer of both kinds of model to both tasks, then inspect the machine."""
    made, kept, sandboxes = folder / "made", folder / "kept", folder / "sandboxes"
    kept.write_text("here")
    sandboxes.mkdir()
    tempfile.tempdir = str(sandboxes)  # whatever a program leaves behind lies or runs in here
    n, passed, unexplained, callers = 0, [], [], 0
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        for name in ("human_eval", "mbpp"):
            for mode in ("base", "instruct"):
                task = make_task(name, mode=mode)
                item = task.items(Data())[0]
                answers = hostile.answers(task, made, kept, server.getsockname()[1])
                judged = dict(
                    zip(answers, task.judge_all([(item, a) for a in answers.values()]), strict=True)
                )
                n += len(judged)
                passed += [f"{name} {mode}: {program}" for program, j in judged.items() if j.value]
                unexplained += [f"{name} {mode}: {program}" for program, j in judged.items() if not j.why]
                print(f"{name}, {mode}: {len(judged)} hostile programs judged", flush=True)
        try:
            server.accept()
            callers = 1
        except TimeoutError:
            pass
    tempfile.tempdir = None
    touched = [made.exists(), not kept.exists() or kept.read_text() != "here", any(sandboxes.iterdir())]
    return {
        "hostile_answers": Value(n, "answers"),
        "counted_as_right": exactly(0, len(passed), "answers"),
        "failed_without_a_reason": exactly(0, len(unexplained), "answers"),
        "files_made_changed_or_left": Value(sum(touched), "files", bar="0", passed=not any(touched)),
        "processes_left": Value(alive := running_in(sandboxes), "processes", bar="0", passed=alive == 0),
        "connections": exactly(0, callers, "connections"),
    }


def running_in(folder: Path) -> int:
    """Processes whose command line or working directory is in ``folder``."""
    n = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            told = (process / "cmdline").read_bytes().decode(errors="replace") + os.readlink(process / "cwd")
        except OSError:
            continue  # it has just ended, or is another user's
        n += str(folder) in told
    return n


def killed(folder: Path, kills: int, randomness: random.Random) -> dict[str, Value]:
    """Compare evaluations that are killed and resumed with one that is not disturbed."""
    model = random_checkpoint(folder / "model")
    began = time.monotonic()
    if code := run_quietly(command(model, folder / "whole")):
        raise SystemExit(f"the undisturbed evaluation ended with exit code {code}")
    length = time.monotonic() - began
    expected = scores(folder / "whole")
    print(f"undisturbed: {length:.1f} s", flush=True)
    done = different = twice = missing = half_done = 0
    rounds = 0
    while done < kills:
        rounds += 1
        out = folder / f"killed{rounds}"
        for _ in range(4):  # some kills hit the start, some the middle, some what an earlier one left over
            if run_quietly(command(model, out), randomness.uniform(0.1 * length, length)) is not None:
                break
            done += 1
            half_done += any(out.glob("*.jsonl"))
        if code := run_quietly(command(model, out)):
            raise SystemExit(f"{out.name}: the resumed evaluation ended with exit code {code}")
        different += scores(out) != expected
        for path in sorted(out.glob("*.jsonl")):
            ids, wanted = item_ids(path), item_ids(folder / "whole" / path.name)
            twice += len(ids) - len(set(ids))
            missing += len(set(wanted) - set(ids))
        print(f"{out.name}: {done} kills so far, {different} different", flush=True)
    return {
        "kills": at_least(kills, done, "kills"),
        "kills_with_items_on_disk": Value(half_done, "kills"),
        "evaluations_resumed": Value(rounds, "evaluations"),
        "with_other_scores": exactly(0, different, "evaluations"),
        "items_twice": exactly(0, twice, "items"),
        "items_missing": exactly(0, missing, "items"),
    }


def random_checkpoint(folder: Path) -> Path:
    tokenizer = Tokenizer.train([document.text for document in read_parallel()], 1024)
    config = ModelConfig(tokenizer.vocab_size, 64, 2, 4, 2, 128, rope_theta=500_000.0, max_context=8192)
    checkpoint.save_model(
        folder, LlamaLM(config).init_weights(0, std=0.2), tokenizer, lineage=Lineage(name="m", stage="lm")
    )
    return folder


def command(model: Path, out: Path) -> list[str]:
    return [sys.executable, "-m", "herd", "eval", str(model), "--tasks", TASKS, "--out", str(out)]


def scores(folder: Path) -> dict[str, object]:
    """Every number of every task."""
    return {row.task: [dict(score) for score in row.scores] for row in read_evaluation(folder).tasks}


def item_ids(path: Path) -> list[str]:
    return [json.loads(line)["id"] for line in path.read_text().splitlines()[1:]]


if __name__ == "__main__":
    main()
