"""llama.cpp, asked by a line and answering by a line: run by the rival's own Python (`make rivals`), not by Herd's.

Reads JSON requests from stdin, one a line, and answers each on stdout with one line:

    {"do": "load", "file": PATH, "threads": 2, "context": 640, "batch": 1, "cache": "f16"}  -> {"version": "..."}
    {"do": "prefill", "tokens": 512}               -> {"seconds": 15.1}, one prompt to its last token's logits
    {"do": "start", "context": 128, "batch": 16}   -> {}, that many prompts read; the steps follow
    {"do": "steps", "steps": 8}                    -> {"seconds": [...]}, each one token for every sequence
    {"do": "rss"}                                  -> {"nbytes": ...}, memory of this process

`cache` q8_0 turns flash attention on, which llama.cpp demands for it; otherwise it chooses. Tokens are arbitrary and
nothing is sampled, as in llama.cpp's own `llama-bench`. A single prompt longer than `LONG` is read in pieces that see
themselves only, where whole it would take an hour: the steps behind it read as many keys and values.
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
    """One model, one context."""

    def __init__(self, request: dict) -> None:
        lib.llama_backend_init()
        quiet = lib.llama_log_callback(lambda level, text, data: None)
        self._quiet = quiet  # the library keeps only a pointer
        lib.llama_log_set(quiet, ctypes.c_void_p(0))
        self.model = lib.llama_model_load_from_file(
            request["file"].encode(), lib.llama_model_default_params()
        )
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {request['file']}")
        params = lib.llama_context_default_params()
        params.n_threads = params.n_threads_batch = request["threads"]
        self.pieces = request["batch"] == 1 and request["context"] > LONG
        params.kv_unified = (
            self.pieces
        )  # the second sequence is where a piece is read: all cells are for both
        params.n_seq_max = 2 if self.pieces else request["batch"]
        params.n_ctx = request["batch"] * (-(-request["context"] // 256) * 256)
        params.n_batch = params.n_ubatch = CHUNK
        kinds = {"f16": lib.GGML_TYPE_F16, "q8_0": lib.GGML_TYPE_Q8_0}
        params.type_k = params.type_v = kinds[request.get("cache", "f16")]
        if params.type_k == lib.GGML_TYPE_Q8_0:
            params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_ENABLED
        self.context = lib.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError("llama.cpp cannot make a context: too little memory?")
        self.n_words = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))
        self.batch = lib.llama_batch_init(max(CHUNK, request["batch"]), 0, 1)
        self.places: list[int] = []

    def forget(self) -> None:
        lib.llama_memory_clear(lib.llama_get_memory(self.context), True)

    def decode(self, tokens: list[tuple[int, int]], wanted: list[bool]) -> None:
        """One call for (sequence, place) of each token; logits for those wanted."""
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

    def read(self, sequence: int, n: int) -> None:
        for start in range(0, n, CHUNK):
            places = range(start, min(n, start + CHUNK))
            self.decode([(sequence, place) for place in places], [place == n - 1 for place in places])

    def read_in_pieces(self, n: int) -> None:
        """The first sequence's tokens: each piece as a sequence of its own that becomes part of the first."""
        memory = lib.llama_get_memory(self.context)
        for start in range(0, n, CHUNK):
            self.decode(
                [(1, place) for place in range(start, min(n, start + CHUNK))], [False] * min(CHUNK, n - start)
            )
            lib.llama_memory_seq_cp(memory, 1, 0, -1, -1)
            lib.llama_memory_seq_rm(memory, 1, -1, -1)

    def prefill(self, request: dict) -> dict:
        self.forget()
        start = time.perf_counter()
        self.read(0, request["tokens"])
        return {"seconds": time.perf_counter() - start}

    def start(self, request: dict) -> dict:
        self.forget()
        n = request["context"]
        if self.pieces:
            self.read_in_pieces(n)
        else:
            for sequence in range(request["batch"]):
                self.read(sequence, n)
        self.places = [n] * request["batch"]
        return {}

    def steps(self, request: dict) -> dict:
        seconds = []
        for _ in range(request["steps"]):
            start = time.perf_counter()
            self.decode(list(enumerate(self.places)), [True] * len(self.places))
            seconds.append(time.perf_counter() - start)
            self.places = [place + 1 for place in self.places]
        return {"seconds": seconds}

    def rss(self, request: dict) -> dict:
        with open("/proc/self/statm") as file:
            return {"nbytes": int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")}


def main() -> None:
    rival: Rival | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["do"] == "load":
                rival = None
                rival = Rival(request)
                answer = {
                    "version": version("llama-cpp-python"),
                    "system": lib.llama_print_system_info().decode(),
                }
            else:
                answer = getattr(rival, request["do"])(request)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
