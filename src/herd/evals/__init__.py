"""Evaluation of models. Functions return `score.Score`s: numbers with a confidence interval, ready for JSON.

Benchmarks are in `tasks/` and run by `harness.py`. Other measurements: `bpb.py` (compression of held-out
text), `fidelity.py` (closeness to a teacher), `quantized.py` (closeness to the unquantized model),
`needle.py`, `tooluse.py`, `code.py`, `samples.py`. Models decode through `herd.engine`. Intervals come from
`bootstrap.py`.
"""
