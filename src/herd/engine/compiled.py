"""The decode step as one graph, for a GPU: a token for each of B sequences, from their ids to their logits.

On the CPU a step is a few hundred calls of kernels that take long; on a GPU each takes microseconds, and Python and the
launches between them cost more. So the step that repeats, one token for everybody, is compiled whole, and with CUDA
graphs replayed by a single launch (gpt-fast, PyTorch blog, 2023). A graph has fixed shapes: sequences and pages are
rounded up to powers of two. Sequences that fill up the number write to a page that nobody reads. Prompts, and guesses
being checked, come in all lengths and go the plain way.

Attention gathers each sequence's pages and runs torch's SDPA on them; weights in blocks are unpacked within the graph.
The tests run the same graph on the CPU. No GPU was at hand: how fast this is was never measured, nor that CUDA graphs
take to it.

Shapes: B sequences rounded up, n pages of the longest rounded up, S = n · PAGE, H query heads, G KV heads, K head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.page_layout import PAGE
from ..kernels.paged_attention import plain_paged_attention
from ..llama.model import LlamaLM
from .cache import Cached, PagedCache


class DecodeStep:
    """`__call__` feeds one token to each sequence. ``backend`` as in `torch.compile`."""

    def __init__(self, model: LlamaLM, cache: PagedCache, backend: str = "inductor") -> None:
        self._model, self._cache = model, cache
        graphs = backend == "inductor" and cache.device.type == "cuda"
        mode = "reduce-overhead" if graphs else None
        self._compiled = torch.compile(self._logits, backend=backend, mode=mode, fullgraph=True, dynamic=False)
        if graphs:
            torch._dynamo.mark_static_address(cache.pool)  # the graph may write to it

    def __call__(self, sequences: Sequence[Cached], tokens: Sequence[int]) -> Tensor:
        """Logits (len(sequences), V) fp32 of what follows. The pages must be there (`PagedCache.grow`)."""
        B = _power_of_two(len(sequences))
        n = _power_of_two(max(len(cached.pages) for cached in sequences))
        spare = self._cache.spare_page
        pages = [cached.pages + [spare] * (n - len(cached.pages)) for cached in sequences]
        pages += [[spare] * n] * (B - len(sequences))
        positions = [cached.length for cached in sequences] + [0] * (B - len(sequences))
        device = self._cache.device
        pages_Bn, positions_B, tokens_B = (
            torch.tensor(x, device=device) for x in (pages, positions, [*tokens, *[0] * (B - len(tokens))])
        )
        logits_BV = self._compiled(tokens_B, positions_B, pages_Bn, self._cache.pool)
        for cached in sequences:
            cached.length += 1
        return logits_BV[: len(sequences)].float()

    def _logits(self, tokens_B: Tensor, positions_B: Tensor, pages_Bn: Tensor, pool: Tensor) -> Tensor:
        pages_B = pages_Bn.gather(1, (positions_B // PAGE)[:, None])[:, 0]
        seen_BS = torch.arange(pages_Bn.shape[1] * PAGE, device=pool.device) <= positions_B[:, None]
        each_B = torch.arange(len(tokens_B), device=pool.device)
        ragged = _Singles(
            (pages_B, positions_B % PAGE), (each_B, pages_Bn, seen_BS), torch.empty(0, 4, dtype=torch.int64)
        )

        def attend(layer: int, q_1BHK: Tensor, k_1BGK: Tensor, v_1BGK: Tensor) -> Tensor:
            return plain_paged_attention(q_1BHK[0], k_1BGK[0], v_1BGK[0], pool, ragged, layer)[None]  # type: ignore[arg-type]

        return self._model.logits(tokens_B[None], positions_B[None], attend)[0]


@dataclass
class _Singles:
    """What `Ragged` works out from tables on the CPU, where all sequences have one token and that is known already."""

    places: tuple[Tensor, Tensor]
    singles: tuple[Tensor, Tensor, Tensor]
    rows: Tensor


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
