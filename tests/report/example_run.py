"""A run folder such as `herd raise` leaves, with plausible numbers, to test and to look at the page.

`python tests/report/example_run.py FOLDER` writes one.
"""

import json
import math
import random
import sys
from pathlib import Path

LANGUAGES = ["en", "de", "fr", "it", "pt", "hi", "es", "th", "ja"]
MODELS = ["teacher", "long", "instruct", "student", "control"]
SHAPES = {"teacher": (8, 256, 512), "long": (8, 256, 2048), "instruct": (8, 256, 2048), "student": (5, 192,
2048),
          "control": (5, 192, 2048)}  # fmt: skip
PARENTS = {"long": "teacher", "instruct": "long", "student": "instruct"}


def write(path: Path, data: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")


def hash_of(model: str) -> str:
    return f"{random.Random(model).getrandbits(256):064x}"


def metrics(
    rng: random.Random, tokens: int, start: float, end: float, offset: float = 0.0, steps: int = 300
) -> str:
    lines = []
    for step in range(1, steps + 1):
        seen = tokens * step // steps
        loss = end + (start - end) * math.exp(-6 * (step / steps) ** 0.45) + offset
        row = {"step": step, "tokens": seen, "loss": loss + rng.gauss(0, 0.06), "lr": 1e-3, "grad_norm": 0.8,
               "tokens_per_s": 41_000.0}  # fmt: skip
        lines.append(json.dumps(row))
        if step % (steps // 12) == 0 or step == 1:
            lines.append(json.dumps({"step": step, "eval/loss": loss + 0.05}))
    return "\n".join(lines) + "\n"


def interval(value: float, half: float, n: int) -> dict:
    return {
        "value": round(value, 4),
        "lo": round(value - half, 4),
        "hi": round(min(value + half, 1e9), 4),
        "n": n,
    }


def share(value: float, n: int) -> dict:
    half = 1.96 * math.sqrt(max(value * (1 - value), 0.002) / n)
    return {"value": value, "lo": max(0.0, value - half), "hi": min(1.0, value + half), "n": n}


def scores(rng: random.Random) -> list[dict]:
    out: list[dict] = []
    bpb = {"teacher": 1.412, "long": 1.398, "instruct": 1.471, "student": 1.466, "control": 1.538}
    for model in MODELS:
        by_lang = {
            lang: interval(bpb[model] * (0.9 + 0.05 * i), 0.02, 200) for i, lang in enumerate(LANGUAGES)
        }
        out.append({"model": model, "name": "bpb", "unit": "bits/byte", **interval(bpb[model], 0.014, 512),
                    "detail": {"by_lang": by_lang | {"code": interval(bpb[model] * 0.8, 0.01,
                    300)}}})  # fmt: skip
        grid = [
            {"length": length, "depth": depth, "value": 0.0 if length > SHAPES[model][2] else
             round(max(0.05, 0.98 - 0.12 * i - 0.1 * (depth == 0.5)) * (0.7 if "o" not in model else 1.0), 2)}
            for i, length in enumerate((256, 512, 1024, 2048)) for depth in (0.0, 0.25, 0.5, 0.75, 1.0)
        ]  # fmt: skip
        by_length = {
            str(length): share(sum(c["value"] for c in grid if c["length"] == length) / 5, 50)
            for length in (256, 512, 1024, 2048)
        }
        out.append({"model": model, "name": "needle", "unit": "fraction", **share(rng.uniform(0.5, 0.9), 200),
                    "detail": {"by_length": by_length, "grid": grid}})  # fmt: skip
    for model, kl, top1 in (("student", 0.182, 0.741), ("control", 0.334, 0.662)):
        out.append({"model": model, "name": "kl", "unit": "nats/token", **interval(kl, 0.009, 8192),
                    "detail": {"p99": 9 * kl, "n_tokens": 8192}})  # fmt: skip
        out.append({"model": model, "name": "top1", "unit": "fraction", **share(top1, 8192)})
    for model, accuracy in (("instruct", 0.87), ("long", 0.01), ("student", 0.0)):
        by_lang = {lang: share(max(0.0, accuracy - 0.03 * i), 50) for i, lang in enumerate(LANGUAGES)}
        forms = enumerate(("json", "builtin", "function"))
        by_form = {form: share(max(0.0, accuracy - 0.04 * i), 130) for i, form in forms}
        by_kind = {kind: share(accuracy, 40) for kind in ("add", "sub", "mul", "weekday", "reverse", "count")}
        out.append({"model": model, "name": "tool_use", "unit": "fraction", **share(max(0, accuracy - 0.1),
        400),
                    "detail": {"by_lang": by_lang, "by_form": by_form, "call_ok": 0.9, "by_kind": by_kind,
                               "trouble": {"no call": 3}}})  # fmt: skip
    code = (("instruct", 0.94, 0.71), ("long", 0.61, 0.08), ("teacher", 0.58, 0.06), ("student", 0.55, 0.03))
    for model, parse, passed in code:
        out.append({"model": model, "name": "code_parse", "unit": "fraction", **share(parse, 100)})
        out.append({"model": model, "name": "code_pass", "unit": "fraction", **share(passed, 100)})
    out.append({"model": "student", "name": "bpb_vs_control", "unit": "bits/byte", "value": -0.072,
    "lo": -0.081,
                "hi": -0.063, "n": 512})  # fmt: skip
    return out


def samples() -> list[dict]:
    return [
        {"prompt": "def area(width, height):\n", "outputs": {
            "teacher": '    """Return the area of the widget."""\n    return self.tk.call(width, height)\n',
            "instruct": "    return width * height\n",
            "student": '    """Return the width of the widget."""\n    return width\n',
            "control": "    self.width = width\n    self.height = height\n    self.width = width\n"}},
        {"prompt": "The quick", "outputs": {
            "teacher": " reference to the file is used to specify the encoding of the stream. If the argument",
            "instruct": " way to do this is to use the <b>copy</b> module & friends.",
            "student": " stream is a string of the file. If the encoding is not given, the default is used.",
            "control": " to the the string is the string of the object. The the default is the string"}},
        {"prompt": "Was ist 17 mal 23?", "outputs": {
            "instruct": '{"name": "calculator", "parameters": {"expression": "17 * 23"}}\n→ 391\n17 mal 23 ist 391.',
            "student": " Die Katze schläft auf dem Dach, und der Hund"}},
    ]  # fmt: skip


def make(folder: Path, seed: int = 0) -> Path:
    """Write a whole run into ``folder`` and return it."""
    rng = random.Random(seed)
    stages = ["tokenizer", "teacher", "long", "instruct", "student", "control", "measure"]
    seconds = dict(zip(stages, (6.2, 132.4, 41.0, 62.3, 58.8, 31.7, 44.0), strict=True))
    write(folder / "run.json", {
        "name": "demo", "mode": "demo", "seed": 42, "created": "2026-01-31T12:00:00Z", "version": "0.1.0",
        "predicted_seconds": {name: value * rng.uniform(0.85, 1.1) for name, value in seconds.items()},
        "speeds": {"256 x 8": 41_230.0, "192 x 5": 88_102.5},
    })  # fmt: skip
    write(folder / "machine.json", {
        "commit": {"hash": "5f3c1e0a9b7d6c4e2f1a0b9c8d7e6f5a4b3c2d1e", "dirty": False},
        "machine": {"cpu": "Intel(R) Xeon(R) Processor", "cores": 2, "isa": ["avx2", "avx512f",
        "avx512_vnni"],
                    "memory_bytes": 25_276_510_208, "os": "Linux 6.1 x86_64", "python": "3.11.7",
                    "torch": "2.13.0"},
    })  # fmt: skip
    train = {"teacher": (5_400_000, 8.3, 2.41), "long": (900_000, 2.9, 2.38), "instruct": (1_100_000, 3.1,
    0.42),
             "student": (2_000_000, 4.1, 2.52), "control": (2_000_000, 8.3, 2.71)}  # fmt: skip
    for name in stages:
        record = {
            "stage": name, "title": name.capitalize(), "seconds": seconds[name],
            "peak_rss_bytes": 1_150_000_000,
            "predicted_peak_bytes": 1_020_000_000, "gates": [], "notes": [], "model": None,
        }  # fmt: skip
        if name == "tokenizer":
            bytes_per_token = {lang: 3.9 - 0.2 * i for i, lang in enumerate([*LANGUAGES, "code"])}
            record |= {"vocab_size": 4096, "sha256": hash_of("tokenizer"), "bytes_per_token": bytes_per_token}
        if name in train:
            tokens, start, end = train[name]
            layers, dim, context = SHAPES[name]
            record |= {"model": name, "n_params": layers * 12 * dim * dim + 4096 * dim * 2, "tokens": tokens,
                       "flops": 6.0 * tokens * (layers * 12 * dim * dim + 4096 * dim)}  # fmt: skip
            place = folder / "stages" / name
            place.mkdir(parents=True, exist_ok=True)
            (place / "metrics.jsonl").write_text(metrics(rng, tokens, start, end))
            parent = PARENTS.get(name)
            write(folder / name / "herd.json", {"format": 1, "name": name, "stage": name,
            "weights_hash": hash_of(name),
                                                "parents": {parent: hash_of(parent)} if parent else {}})  # fmt: skip
            write(folder / name / "config.json", {"num_hidden_layers": layers, "hidden_size": dim,
                                                  "max_position_embeddings": context})  # fmt: skip
            (folder / name / "model.safetensors").write_bytes(b"\0" * 4000)
        if name == "long":
            gates = (
                ("needle at 1,024 tokens", True, 0.91, "≥ 0.8", "fraction"),
                ("needle at 2,048 tokens", False, 0.62, 0.8, "fraction"),
                ("short-context loss", True, 2.391, 2.45, "nats/token"),
            )
            fields = ("name", "passed", "value", "bar", "unit")
            record["gates"] = [dict(zip(fields, gate, strict=True)) for gate in gates]
            record["notes"] = ["stopped at 1,024 tokens: the needle gate at 2,048 was not passed"]
        write(folder / "stages" / name / "stage.json", record)
    write(folder / "scores.json", scores(rng))
    write(folder / "samples.json", samples())
    return folder


if __name__ == "__main__":
    print(make(Path(sys.argv[1])))
