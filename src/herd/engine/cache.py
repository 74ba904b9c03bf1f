"""The KV cache: one contiguous slot a sequence, all slots of a layer in one tensor.

The active sequences are always the first rows, so that a decode step reads one view and runs one attention for all of
them; when a sequence ends, the last row moves into its place. Capacity grows by blocks as the longest sequence does,
not to the whole context at once. Attention is handed to the model as a closure (`llama.attention.Attend`), which writes
the new keys and values before it reads: the model never sees a cache, and a paged one can stand here later.

Shapes: B rows, T new tokens, S cached tokens, H query heads, G KV heads, R = H / G query heads a KV head, K head dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..llama.attention import Attend, sdpa
from ..llama.config import ModelConfig
from .memory import round_to_block

READ_BLOCK = 32
"""Decode reads keys up to the longest row, rounded up to this, so that shapes (and buffers) repeat for a while."""
QUERY_BLOCK = 256
"""Prefill behind cached tokens goes through queries by this many, so that no mask is (prompt x context)."""


class KVCache:
    """Keys and values (slots, G, S, K) of every layer. ``n_rows`` sequences are active, in the first slots."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        self.config, self.n_rows, self.slots, self.capacity = config, 0, 0, 0
        empty = torch.zeros(0, config.n_kv_heads, 0, config.head_dim, dtype=dtype, device=device)
        self._keys = [empty for _ in range(config.n_layers)]
        self._values = [empty for _ in range(config.n_layers)]

    @property
    def nbytes(self) -> int:
        """Bytes held now; equals `memory.nbytes(config, slots, capacity, bytes of the dtype)`."""
        return sum(t.numel() * t.element_size() for t in (*self._keys, *self._values))

    def reserve(self, slots: int, tokens: int) -> None:
        """Make room for ``slots`` sequences of ``tokens`` tokens (all active rows fit into both).

        Where it must allocate, it takes just that, so that many short sequences earlier and a long one now do not
        multiply; a layer at a time, so that no second cache exists while copying.
        """
        if slots <= self.slots and tokens <= self.capacity:
            return
        tokens = round_to_block(tokens)
        kept = min(tokens, self.capacity)
        for tensors in (self._keys, self._values):
            for layer, old in enumerate(tensors):
                # zeros, not empty: masked places are multiplied by 0, and 0 x NaN is NaN
                new = old.new_zeros(slots, old.shape[1], tokens, old.shape[3])
                new[: self.n_rows, :, :kept] = old[: self.n_rows, :, :kept]
                tensors[layer] = new
        self.slots, self.capacity = slots, tokens

    def release(self) -> None:
        """Give all memory back; only when no row is active."""
        if self.n_rows == 0:
            self.slots = self.capacity = 0
            for tensors in (self._keys, self._values):
                tensors[:] = [t.new_zeros(0, t.shape[1], 0, t.shape[3]) for t in tensors]

    def add_rows(self, n: int) -> int:
        """Activate ``n`` more rows (after `reserve`) and return the first one's number."""
        self.n_rows += n
        return self.n_rows - n

    def drop(self, rows: Sequence[int], lengths: Sequence[int]) -> list[tuple[int, int]]:
        """Free ``rows``; the last rows move into the holes. Returns the moves (from, to), to be done in this order.

        ``lengths`` are the cached tokens of all active rows, so that only those are copied.
        """
        moves, lengths = [], list(lengths)
        for row in sorted(rows, reverse=True):
            last = self.n_rows - 1
            if row != last:
                n = lengths[last]
                for tensor in (*self._keys, *self._values):
                    tensor[row, :, :n] = tensor[last, :, :n]
                lengths[row] = n
                moves.append((last, row))
            self.n_rows -= 1
        return moves

    def prefill(self, first: int, start: int) -> Attend:
        """Attention for T new tokens at places start..start+T-1 of rows first..first+B-1, right-padded to one T.

        Padding writes keys behind a row's end, where decode overwrites them before it ever looks.
        """

        def attend(layer: int, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor) -> Tensor:
            B, T = q_BTHK.shape[:2]
            rows, end = slice(first, first + B), start + T
            self._keys[layer][rows, :, start:end] = k_BTGK.transpose(1, 2)
            self._values[layer][rows, :, start:end] = v_BTGK.transpose(1, 2)
            if start == 0:
                return sdpa(q_BTHK, k_BTGK, v_BTGK, causal=True)
            k_BSGK = self._keys[layer][rows].transpose(1, 2)
            v_BSGK = self._values[layer][rows].transpose(1, 2)
            out = []
            for t in range(0, T, QUERY_BLOCK):
                stop = min(t + QUERY_BLOCK, T)
                queries_t = torch.arange(start + t, start + stop, device=q_BTHK.device)
                seen_tS = torch.arange(start + stop, device=q_BTHK.device) <= queries_t[:, None]
                S = start + stop
                out.append(sdpa(q_BTHK[:, t:stop], k_BSGK[:, :S], v_BSGK[:, :S], mask=seen_tS))
            return torch.cat(out, dim=1)

        return attend

    def decode(self, positions: Sequence[int]) -> Attend:
        """Attention for one new token of every active row, at its place ``positions[row]``; T = 1."""
        keys, values = self._keys, self._values
        device, dtype = keys[0].device, keys[0].dtype
        B, S = self.n_rows, min(self.capacity, -(-(max(positions) + 1) // READ_BLOCK) * READ_BLOCK)
        rows_B = torch.arange(B, device=device)
        positions_B = torch.tensor(positions, device=device)
        unseen_BS = torch.arange(S, device=device) > positions_B[:, None]
        mask_B11S = torch.zeros(B, S, dtype=dtype, device=device).masked_fill_(unseen_BS, -torch.inf)[:, None, None]

        def attend(layer: int, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor) -> Tensor:
            keys[layer][rows_B, :, positions_B] = k_BTGK[:, 0]
            values[layer][rows_B, :, positions_B] = v_BTGK[:, 0]
            G, K = k_BTGK.shape[2:]
            # the query heads of a KV head stand side by side: they are R queries of one head
            q_BGRK = q_BTHK.view(B, G, -1, K)
            out = F.scaled_dot_product_attention(
                q_BGRK, keys[layer][:B, :, :S], values[layer][:B, :, :S], attn_mask=mask_B11S
            )
            return out.reshape(B, 1, -1, K)

        return attend
