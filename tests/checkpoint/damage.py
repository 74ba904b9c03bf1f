"""Mutate checkpoint files by seed: the tests use 300 mutations, `bench/mutations.py` ten thousand."""

import random
import resource
import shutil
import struct
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from herd import checkpoint
from herd.checkpoint.gguf import GGUF
from herd.errors import HerdError
from herd.llama.model import LlamaLM
from herd.quant.linear import packed_weights


class Bomb:
    """A pickle of it runs code when it is opened."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('the pickle was run')",))


@contextmanager
def little_memory() -> Iterator[None]:
    """Address space for 2 GiB more than now: whoever allocates for a claim fails with something else than ours."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + (2 << 30), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def mutate(data: bytes, rng: random.Random, header: int) -> bytes:
    """Apply one to three kinds of damage, half of them in the header, where they have more effect."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at = rng.randrange(min(header, len(out)) if rng.random() < 0.5 else len(out))
        kind = rng.randrange(6)
        if kind == 0:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            out[at] = rng.randrange(256)
        elif kind == 2:
            out[at : at + 8] = struct.pack("<Q", rng.choice((0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)))
        elif kind == 3:
            del out[at : at + rng.choice((1, 8, 1000, len(out)))]
        elif kind == 4:
            out[at:at] = rng.randbytes(rng.choice((1, 8, 100)))
        else:
            source = rng.randrange(len(out))
            out[at : at + 64] = out[source : source + 64]
        if not out:
            break
    return bytes(out)


def same_model(a: LlamaLM, b: LlamaLM) -> bool:
    ours = {n: x for n, _, x in packed_weights(a)} | dict(a.named_parameters())
    theirs = {n: x for n, _, x in packed_weights(b)} | dict(b.named_parameters())
    return ours.keys() == theirs.keys() and all(torch.equal(x, theirs[n]) for n, x in ours.items())


def fuzz(folder: Path, file: str, seeds: Iterable[int], work: Path) -> Counter[str]:
    """Count the outcomes of mutations of one file of a folder, with the slowest one's milliseconds.

    Through the folder, whose lineage knows the hash, a file is refused or gives the same model. A GGUF file
    is imported as well, without its lineage: refused, or sound (its numbers cannot be known). A refusal is
    one line. For anything else: AssertionError, with the seed.
    """
    data, reference = (folder / file).read_bytes(), checkpoint.load_model(folder)
    header = (
        GGUF(folder / file).header_bytes if file.endswith(".gguf") else 8 + int.from_bytes(data[:8], "little")
    )
    target, imported = work / "fuzz", work / "imported"
    shutil.copytree(folder, target)
    counts = Counter[str]()
    with little_memory(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seed in seeds:
            start = time.perf_counter()
            (target / file).write_bytes(mutate(data, random.Random(seed), header))
            try:
                assert same_model(checkpoint.load_model(target), reference), (
                    f"seed {seed}: another model was loaded"
                )
                checkpoint.load_tokenizer(target)
                counts["the same model"] += 1
            except HerdError as error:
                _one_line(error, seed)
                counts["refused"] += 1
            if file.endswith(".gguf"):
                counts[_import(target / file, imported, seed)] += 1
            counts["slowest"] = max(counts["slowest"], round(1000 * (time.perf_counter() - start)))
    shutil.rmtree(target)
    shutil.rmtree(imported, ignore_errors=True)
    return counts


def _import(file: Path, out: Path, seed: int) -> str:
    try:
        checkpoint.import_gguf(file, out)
        model = checkpoint.load_model(out)
    except HerdError as error:
        _one_line(error, seed)
        return "import refused"
    assert all(p.isfinite().all() for p in model.parameters()), f"seed {seed}: not finite"
    model.logits(torch.zeros(1, 2, dtype=torch.int64))
    return "imported, sound"


def _one_line(error: HerdError, seed: int) -> None:
    assert "\n" not in str(error), f"seed {seed}: {error}"
