"""Tune a real model, SmolLM2-135M-Instruct, and measure what it gained and lost, row by row.

    HERD_TEST_DATA=../shared/data python bench/tune.py ROW [--limit N] [--commit]

Each row is one command and one receipt (tune-ROW). Finished parts are kept in --work, so the same command continues
after an interruption. Minutes are for two quiet cores:

    tools      60   teach it to call tools: generated dialogs in its own template, then 400 held-out dialogs, bits per
                    byte of two kinds of text that are not in the replay, and HellaSwag, each before and after
    merge      25   an adapter after 100 steps at 1e-5, and one at 1e-3, merged to fp32, bf16, Q8_0, Q4_K_M and Q4_0:
                    KL to base + adapter, the share that survives, and for Q4_0 GPTQ on the tuning data and the repair
    synth       3   a teacher with 30 % of planted wrong answers, by each way of verification: what is removed and kept
    language    2   4,096 tokens added for Japanese: bytes per token of held-out text, and old texts whose ids change
    japanese   40   the model with these tokens, and the model as it is, trained on Japanese at equal FLOPs: bits per
                    byte of held-out Japanese, and of English that is not in the replay

``--limit N`` makes a row small: N items of evaluation and 1,000 N tokens of training.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from common import DATA, WORK, run_row, save_receipt
from herd import checkpoint
from herd.data.builtin import read_stdlib
from herd.data.dialogs import Dialog, stream_dialogs
from herd.data.tool_dialogs import names_tools, openai_messages, schemas
from herd.distill.synth import synthesize
from herd.distill.teachers import SynthOptions
from herd.evals.bpb import compare_compression, compression
from herd.evals.harness import run_task
from herd.evals.local import CheckpointModel
from herd.evals.tasks import make_task
from herd.evals.tasks.data import Data
from herd.evals.tooluse import tool_use
from herd.evals.windows import from_texts
from herd.files import write_atomically, write_json
from herd.report.receipt import Value
from herd.text.extend import extend_vocabulary
from herd.text.tool_support import with_tool_support
from herd.tune.language import LanguageOptions, bytes_per_token, divided_text, teach_language
from herd.tune.merge import REPAIR_TOKENS, merge_adapter
from herd.tune.options import TuneOptions
from herd.tune.run import compression_record, open_run, stored_compression, tune

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "distill"))

FILE = DATA / "smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
TOOL_TOKENS, TOOL_LR = 400_000, 1.5e-4
N_DIALOGS, N_TOOL_ITEMS, N_HELLASWAG = 900, 400, 2000
TEXT_BYTES = 40_000
JAPANESE_TOKENS = 200_000
MERGE_STEPS = 100
FORMATS = ("fp32", "bf16", "Q8_0", "Q4_K_M", "Q4_0")
REPLAY = ("oasst1_en/en-validation.jsonl", "debian_docs/handbook.en.txt")
"""What is mixed in against forgetting. Forgetting is measured on an encyclopedia and on Python code."""


def kept(path: Path, make: Callable[[], Any]) -> Any:
    """Return the JSON value in a file, or make and write it."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, make())
    return json.loads(path.read_text())


# Tools ------------------------------------------------------------------------------------------------------


def tool_dialogs(
    seed: int, *, split: str = "train", tasks: Sequence[str] = ("arithmetic", "dates", "strings", "chat")
) -> Iterator[Dialog]:
    """Yield endless English dialogs whose system message names tools."""
    dialogs = stream_dialogs(seed, split=split, languages=["en"], tool_call_formats=["json"], tasks=tasks)
    return filter(names_tools, dialogs)


def tool_rows(dialogs: Iterator[Dialog], count: int) -> list[str]:
    """Return lines ``{"messages", "tools"}`` of the first ``count`` dialogs."""
    return [
        json.dumps({"messages": openai_messages(dialog.messages), "tools": schemas(dialog)}) + "\n"
        for dialog in islice(dialogs, count)
    ]


def tools_row(args: argparse.Namespace) -> None:
    work = args.work / "tools"
    data = work / "dialogs.jsonl"
    if not data.exists():
        work.mkdir(parents=True, exist_ok=True)
        write_atomically(data, "".join(tool_rows(tool_dialogs(0), N_DIALOGS)))
    options = TuneOptions(
        model=str(FILE), data=(str(data),), out=str(work / "run"),
        tokens=1000 * args.limit if args.limit else TOOL_TOKENS,
        replay=tuple(str(DATA / name) for name in REPLAY), replay_share=0.25, method="full",
        lr=TOOL_LR, other=(str(DATA / "wikitext2" / "valid.txt"),),
    )  # fmt: skip
    open_run(options)
    tuned = tune(options, Data(), on_step=printed)
    sources = {"untuned": str(FILE), "tuned": str(tuned.folder)}
    found: dict[str, dict[str, Any]] = {name: {} for name in sources}
    for part, measure in (("right", _dialogs), ("text", _texts), ("hellaswag", _hellaswag)):
        for name in ("tuned", "untuned"):
            path = work / f"{part}-{name}.json"
            found[name][part] = kept(
                path, lambda m=measure, n=name: m(sources[n], work / "evals", args.limit)
            )
            print(
                part,
                name,
                {k: v for k, v in found[name][part].items() if k in ("value", "lo", "hi")},
                flush=True,
            )
    right, right_before = (found[name]["right"] for name in ("tuned", "untuned"))
    values = {
        "right": Value(right["value"], "fraction", bar=">= 0.9", passed=right["value"] >= 0.9),
        "right_lo": Value(right["lo"], "fraction"),
        "right_hi": Value(right["hi"], "fraction"),
        "right_untuned": Value(right_before["value"], "fraction"),
        "dialogs": Value(right["n"], "dialogs"),
        "tokens": Value(tuned.result.tokens, "tokens"),
        "seconds": Value(tuned.result.seconds, "s"),
    }
    scored, scored_before = (found[name]["hellaswag"] for name in ("tuned", "untuned"))
    lo, hi = scored_before["lo"], scored_before["hi"]
    passed = lo <= scored["value"] <= hi
    values["hellaswag"] = Value(
        scored["value"], "fraction", bar=f"within [{lo:.3f}, {hi:.3f}]", passed=passed
    )
    values["hellaswag_untuned"] = Value(scored_before["value"], "fraction")
    values["hellaswag_items"] = Value(scored["n"], "items")
    for name, before in found["untuned"]["text"].items():
        difference = compare_compression(
            name, *(stored_compression(record, name) for record in (found["tuned"]["text"][name], before))
        )
        total = sum(before["bits"]) / sum(before["n_bytes"])
        relative = difference.value / total
        values[f"bits_{name}"] = Value(relative, "relative change", bar="<= 0.02", passed=relative <= 0.02)
        values[f"bits_{name}_untuned"] = Value(total, "bits/byte")
    save_receipt(
        "tune-tools", commit=args.commit, what="SmolLM2-135M-Instruct taught to call tools", values=values, seed=0,
        notes=f"{N_DIALOGS} dialogs, replay {', '.join(REPLAY)} at 25 % of the rows, lr {TOOL_LR}; {right['detail']}",
    )  # fmt: skip


def _dialogs(source: str, folder: Path, limit: int | None) -> dict[str, Any]:
    """Return the fraction of held-out dialogs that are answered rightly with a call, and some answers."""
    model, tokenizer = checkpoint.load_model(source), checkpoint.load_tokenizer(source)
    assert tokenizer is not None
    items = (d for d in tool_dialogs(7, split="test", tasks=("arithmetic", "dates", "strings")) if d.call)
    chosen = list(islice(items, min(limit or N_TOOL_ITEMS, N_TOOL_ITEMS)))
    used = tool_use(model, with_tool_support(tokenizer), chosen, max_tokens=96, max_batch=64)
    answers = [[dict(message) for message in answered.produced] for answered in used.answered[:8]]
    return used.score().record() | {"answers": answers}


def _texts(source: str, folder: Path, limit: int | None) -> dict[str, Any]:
    """Return the bits of two kinds of text that are not in the replay."""
    model, tokenizer = checkpoint.load_model(source), checkpoint.load_tokenizer(source)
    assert tokenizer is not None
    found = {}
    texts = {
        "encyclopedia": _wikitext(),
        "code": (d.text for d in read_stdlib(Path(json.__file__).parents[1])),
    }
    for name, documents in texts.items():
        held_out = from_texts(documents, tokenizer, max_bytes=1000 * limit if limit else TEXT_BYTES)
        found[name] = compression_record(compression(model, held_out, 1024))
    return found


def _hellaswag(source: str, folder: Path, limit: int | None) -> dict[str, Any]:
    """Return the score on the first items, from the packed or bf16 weights as they are."""
    model, tokenizer = checkpoint.load_model(source), checkpoint.load_tokenizer(source)
    assert tokenizer is not None
    judged = CheckpointModel(
        model, tokenizer, name=Path(source).name, hash=checkpoint.checkpoint_hash(source)[:12]
    )
    out = folder / Path(source).name
    row = run_task(judged, make_task("hellaswag"), Data(DATA), out, limit=limit or N_HELLASWAG)
    if row.status != "done":
        raise SystemExit(f"hellaswag: {row.reason}")
    return {key: row.scores[0][key] for key in ("value", "lo", "hi", "n", "name")}


# Merging ----------------------------------------------------------------------------------------------------


def merge_row(args: argparse.Namespace) -> None:
    work = args.work / "merge"
    train, held = work / "train.jsonl", work / "held.jsonl"
    if not held.exists():
        work.mkdir(parents=True, exist_ok=True)
        made = tool_rows(tool_dialogs(1), 160)
        write_atomically(train, "".join(made[10:]))
        write_atomically(held, "".join(made[:10]))
    steps = args.limit or MERGE_STEPS
    values: dict[str, Value] = {}
    for name, lr in (("short", 1e-5), ("long", 1e-3)):
        out = work / name
        options = TuneOptions(
            model=str(FILE), data=(str(train),), heldout=str(held), out=str(out), method="lora", lr=lr, steps=steps,
            other=(str(DATA / "wikitext2" / "valid.txt"),),
        )  # fmt: skip
        open_run(options)
        folder = tune(options, Data(), on_step=printed).folder
        for to, way in (*((to, "") for to in FORMATS), ("Q4_0", "gptq"), ("Q4_0", "repair")):
            label = f"{name}_{to}{'_' if way else ''}{way}".lower()
            path = work / f"{label}.json"
            report = kept(path, lambda f=folder, t=to, w=way: vars(_merged(f, t, w, str(held), work)))
            values |= _merge_values(label, report)
            print(label, f"KL {report['merged_kl']:.3g}, survived {report['survived']:.3f}", flush=True)
        plain, fitted, repaired = (values[f"{name}_q4_0{way}_kl"].value for way in ("", "_gptq", "_repair"))
        values[f"{name}_gptq_ratio"] = Value(float(fitted) / float(plain), "x plain rounding's KL")
        ratio = float(repaired) / float(plain)
        values[f"{name}_repair"] = Value(ratio, "x plain rounding's KL", bar="<= 0.5", passed=ratio <= 0.5)
    save_receipt(
        "tune-merge", commit=args.commit, what="Merging an adapter of SmolLM2 and measuring the result", values=values,
        seed=0, notes=f"{steps} steps; held-out: 10 dialogs; KL in nats per token",
    )  # fmt: skip


def _merged(folder: Path, to: str, way: str, held: str, work: Path) -> Any:
    out = work / "out"
    shutil.rmtree(out, ignore_errors=True)
    tokens = REPAIR_TOKENS if way == "repair" else 0
    return merge_adapter(folder, to, out, examples=[held], gptq=way == "gptq", repair=tokens, on_step=printed)


def _merge_values(label: str, report: dict[str, Any]) -> dict[str, Value]:
    kl, base, survived = report["merged_kl"], report["base_rounding_kl"], report["survived"]
    bar, passed = None, None
    if label.endswith("fp32"):
        bar, passed = "<= 1e-6", kl <= 1e-6
    elif label.endswith("bf16"):
        bar, passed = f"<= {3 * base:.3g}, 3 x the untuned base's", kl <= 3 * base
    values = {
        f"{label}_kl": Value(kl, "nats/token", bar=bar, passed=passed),
        f"{label}_base_kl": Value(base, "nats/token"),
        f"{label}_survived": Value(survived, "fraction"),
    }
    if label == "short_q4_0":
        refused = not report["written"]
        values["short_q4_0_refused"] = Value("yes" if refused else "no", "", bar="refused", passed=refused)
    return values


# Synthesis ----------------------------------------------------------------------------------------------------


def synth_row(args: argparse.Namespace) -> None:
    from test_synth import planted

    values: dict[str, Value] = {}
    for kind, samples, n in (
        ("execution", 1, 1000),
        ("solver", 1, 4000),
        ("schema", 1, 4000),
        ("agreement", 5, 1000),
    ):
        prompts, teacher = planted(kind, args.limit or n, share=0.3, seed=1)
        with tempfile.TemporaryDirectory() as folder:
            synthesize(prompts, teacher, Path(folder), SynthOptions(samples=samples, similarity=1.0))
            lines = (Path(folder) / "journal.jsonl").read_text(encoding="utf-8").splitlines()
        accepted = [answer[1] for line in lines for answer in json.loads(line)["answers"]]
        good = [right for _, right in teacher.asked]
        removed = [not kept_ for kept_, right in zip(accepted, good, strict=True) if not right]
        lost = [not kept_ for kept_, right in zip(accepted, good, strict=True) if right]
        shares = sum(removed) / len(removed), sum(lost) / len(lost)
        values |= {
            f"{kind}_removed": Value(shares[0], "of the wrong", bar=">= 0.99", passed=shares[0] >= 0.99),
            f"{kind}_lost": Value(shares[1], "of the right", bar="<= 0.03", passed=shares[1] <= 0.03),
            f"{kind}_wrong": Value(len(removed), "answers"),
            f"{kind}_right": Value(len(lost), "answers"),
        }
    save_receipt(
        "tune-synth", commit=args.commit, what="Verification of a teacher's answers with planted mistakes", seed=1,
        values=values, notes="agreement: five samples, mistakes that differ; equal mistakes are not caught by it",
    )  # fmt: skip


# A language -------------------------------------------------------------------------------------------------


def language_row(args: argparse.Namespace) -> None:
    docs = DATA / "debian_docs"
    tokenizer = checkpoint.load_tokenizer(FILE)
    assert tokenizer is not None
    train, heldout = divided_text([str(path) for path in sorted(docs.glob("*.ja.txt"))])
    extended = extend_vocabulary(tokenizer, train[: args.limit], 4096)
    before, after = (bytes_per_token(each, heldout) for each in (tokenizer, extended.tokenizer))
    changed, n_blocks = 0, 0
    for path in sorted(docs.glob("*.txt")):
        if ".ja." in path.name:
            continue
        text = path.read_text(encoding="utf-8")
        blocks = [text[start : start + 2000] for start in range(0, len(text), 2000)]
        n_blocks += len(blocks)
        changed += sum(tokenizer.encode(block) != extended.tokenizer.encode(block) for block in blocks)
    values = {
        "added": Value(len(extended.pieces), "tokens"),
        "bytes_per_token_before": Value(before, "bytes/token"),
        "bytes_per_token": Value(after, "bytes/token", bar=">= 3.0", passed=after >= 3.0),
        "old_texts": Value(n_blocks, "blocks of 2,000 characters in six languages"),
        "old_texts_changed": Value(changed, "blocks", bar="0", passed=changed == 0),
    }
    save_receipt(
        "tune-language", commit=args.commit, what="Japanese tokens added to SmolLM2's vocabulary", values=values,
        seed=0, notes="debian_docs; every tenth block of 2,000 characters is held out; its ASCII parts count too",
    )  # fmt: skip


def japanese_row(args: argparse.Namespace) -> None:
    work, docs = args.work / "japanese", DATA / "debian_docs"
    texts = tuple(str(path) for path in sorted(docs.glob("*.ja.txt")))
    replay = tuple(str(DATA / name) for name in REPLAY)
    tokens = 1000 * args.limit if args.limit else JAPANESE_TOKENS
    options = LanguageOptions(
        model=str(FILE),
        language="ja",
        text=texts,
        out=str(work / "extended"),
        add=4096,
        tokens=tokens,
        replay=replay,
    )
    extended = teach_language(options, on_step=printed).folder
    config = checkpoint.load_config(FILE)
    share = checkpoint.load_config(extended).n_params / config.n_params  # of the operations for a token
    control_options = TuneOptions(
        model=str(FILE), data=(str(work / "extended" / "train.jsonl"),), out=str(work / "control"), method="lora",
        rank=options.rank, tokens=round(tokens * share), replay=replay, replay_share=options.replay_share,
        context=512, other=(str(DATA / "wikitext2" / "valid.txt"),),
    )  # fmt: skip
    open_run(control_options)
    control = tune(control_options, Data(), on_step=printed).folder
    heldout = divided_text(texts)[1]
    sources = {"untrained": str(FILE), "control": str(control), "extended": str(extended)}
    found = {
        name: kept(
            work / f"bits-{name}.json", lambda s=source: _bits_of(s, {"ja": heldout, "en": _wikitext()})
        )
        for name, source in sources.items()
    }
    values = {
        f"{lang}_{name}": Value(_total(record[lang]), "bits/byte")
        for name, record in found.items()
        for lang in record
    }
    gained, forgotten = (
        compare_compression(
            lang, *(stored_compression(found[name][lang], lang) for name in ("extended", other))
        )
        for lang, other in (("ja", "control"), ("en", "untrained"))
    )
    before = values["en_untrained"].value
    english = values["en_extended"].value / before - 1
    values |= {
        "ja_extended_against_control": Value(
            gained.value, "bits/byte", lo=gained.lo, hi=gained.hi, bar="< 0", passed=gained.hi < 0
        ),
        "en_change": Value(
            english, "relative change", lo=forgotten.lo / before, hi=forgotten.hi / before,
            bar="<= 0.015", passed=english <= 0.015,
        ),
        "tokens_extended": Value(tokens, "tokens"),
        "tokens_control": Value(control_options.tokens, "tokens"),
    }  # fmt: skip
    save_receipt(
        "tune-japanese", commit=args.commit, values=values, seed=0,
        what="SmolLM2 trained on Japanese, with 4,096 new tokens and without, at equal FLOPs",
        notes=f"debian_docs; every tenth block is held out; replay {', '.join(REPLAY)} at 20 % of the rows; LoRA 64",
    )  # fmt: skip


def _bits_of(source: str, texts: dict[str, list[str]]) -> dict[str, Any]:
    model, tokenizer = checkpoint.load_model(source), checkpoint.load_tokenizer(source)
    assert tokenizer is not None
    return {
        name: compression_record(
            compression(model, from_texts(documents, tokenizer, max_bytes=TEXT_BYTES), 512)
        )
        for name, documents in texts.items()
    }


def _total(record: dict[str, list[float]]) -> float:
    return sum(record["bits"]) / sum(record["n_bytes"])


def _wikitext() -> list[str]:
    text = next((DATA / "wikitext2").rglob("*test*")).read_text(encoding="utf-8")
    return [part for part in text.split("\n = ") if len(part) > 2000]


def printed(record: dict[str, Any]) -> None:
    """Print every fifth step."""
    if record["step"] % 5 == 0:
        print(
            f"step {record['step']}: loss {record['loss']:.3f}, {record['tokens_per_s']:,.0f} tokens/s",
            flush=True,
        )


def main() -> None:
    rows: dict[str, Callable[[argparse.Namespace], None]] = {
        "tools": tools_row, "merge": merge_row, "synth": synth_row, "language": language_row,
        "japanese": japanese_row,
    }  # fmt: skip
    run_row(__doc__, rows, limit="a small version: items, and thousands of tokens", work=WORK / "tune")


if __name__ == "__main__":
    main()
