"""Serve llama.cpp by lines of JSON. The Python of `make rivals` runs this program, not Herd's.

It reads a request per line from stdin and answers each with a line on stdout:

    {"do": "load", "file": PATH, "threads": 2, "context": 640, "batch": 1, "cache": "f16"}
                                                   -> {"version": "...", "system": "..."}
    {"do": "prefill", "tokens": 512}               -> {"seconds": 15.1}: a prompt up to its logits
    {"do": "start", "context": 128, "batch": 16}   -> {}: the prompts are in the cache, and steps may follow
    {"do": "steps", "steps": 8}                    -> {"seconds": [...]}: each step is one token per sequence
    {"do": "rss"}                                  -> {"nbytes": ...}: memory of this process

A q8_0 cache turns flash attention on, because llama.cpp requires it. Otherwise llama.cpp chooses. Tokens are
arbitrary and nothing is sampled, as in llama.cpp's own `llama-bench`.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from importlib.metadata import version

import llama_cpp as lib

CHUNK, LONG = 512, 8192


class Rival:
    """A model in llama.cpp with its context."""

    def __init__(self, file: str, threads: int, context: int, batch: int, cache: str) -> None:
        lib.llama_backend_init()
        quiet = lib.llama_log_callback(lambda level, text, data: None)
        self._quiet = quiet  # llama.cpp stores only a pointer
        lib.llama_log_set(quiet, ctypes.c_void_p(0))
        self.model = lib.llama_model_load_from_file(file.encode(), lib.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {file}")
        params = lib.llama_context_default_params()
        params.n_threads = params.n_threads_batch = threads
        self.pieces = batch == 1 and context > LONG
        params.kv_unified = self.pieces  # a chunk is read as a second sequence, and both use all cells
        params.n_seq_max = 2 if self.pieces else batch
        params.n_ctx = batch * (-(-context // 256) * 256)
        params.n_batch = params.n_ubatch = CHUNK
        params.type_k = params.type_v = {"f16": lib.GGML_TYPE_F16, "q8_0": lib.GGML_TYPE_Q8_0}[cache]
        if cache == "q8_0":
            params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_ENABLED
        self.context = lib.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError("llama.cpp cannot make a context: too little memory?")
        self.n_words = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))
        self.batch = lib.llama_batch_init(max(CHUNK, batch), 0, 1)
        self.places: list[int] = []

    def decode(self, tokens: list[tuple[int, int]], wanted: list[bool]) -> None:
        """Run one batch of tokens, given as (sequence, position).

        Compute logits for those that ``wanted`` marks.
        """
        batch = self.batch
        batch.n_tokens = len(tokens)
        for i, (sequence, place) in enumerate(tokens):
            batch.token[i] = (7919 * place + 104_729 * sequence + 17) % self.n_words
            batch.pos[i] = place
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = wanted[i]
        failed = lib.llama_decode(self.context, batch)
        if failed:
            raise RuntimeError(f"llama_decode returned {failed}")
        lib.llama_synchronize(self.context)

    def read_prompt(self, sequence: int, n: int) -> None:
        for start in range(0, n, CHUNK):
            places = range(start, min(n, start + CHUNK))
            self.decode([(sequence, place) for place in places], [place == n - 1 for place in places])

    def read_in_pieces(self, n: int) -> None:
        """Read the first sequence's tokens in chunks. Each is its own sequence and then joins the first."""
        memory = lib.llama_get_memory(self.context)
        for start in range(0, n, CHUNK):
            places = range(start, min(n, start + CHUNK))
            self.decode([(1, place) for place in places], [False] * len(places))
            lib.llama_memory_seq_cp(memory, 1, 0, -1, -1)
            lib.llama_memory_seq_rm(memory, 1, -1, -1)

    def prefill(self, tokens: int) -> dict:
        lib.llama_memory_clear(lib.llama_get_memory(self.context), True)
        start = time.perf_counter()
        self.read_prompt(0, tokens)
        return {"seconds": time.perf_counter() - start}

    def start(self, context: int, batch: int) -> dict:
        lib.llama_memory_clear(lib.llama_get_memory(self.context), True)
        if self.pieces:
            self.read_in_pieces(context)
        else:
            for sequence in range(batch):
                self.read_prompt(sequence, context)
        self.places = [context] * batch
        return {}

    def steps(self, steps: int) -> dict:
        seconds = []
        for _ in range(steps):
            start = time.perf_counter()
            self.decode(list(enumerate(self.places)), [True] * len(self.places))
            seconds.append(time.perf_counter() - start)
            self.places = [place + 1 for place in self.places]
        return {"seconds": seconds}

    def rss(self) -> dict:
        with open("/proc/self/statm") as file:
            return {"nbytes": int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")}


def main() -> None:
    rival: Rival | None = None
    for line in sys.stdin:
        request = json.loads(line)
        do = request.pop("do")
        try:
            if do == "load":
                rival = Rival(**request)
                system = lib.llama_print_system_info().decode()
                answer = {"version": version("llama-cpp-python"), "system": system}
            else:
                answer = getattr(rival, do)(**request)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
