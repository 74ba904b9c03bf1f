"""Causal and packed attention compared with float64 loops, and positions of packed rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from herd.llama.attention import causal, packed, packed_positions


def naive(q, k, v, sees):
    """Softmax attention in float64, one query and head at a time.

    ``sees(b, t, s)`` says what may be looked at.
    """
    B, T, H, K = q.shape
    group = H // k.shape[2]
    out = torch.zeros(B, T, H, K, dtype=torch.float64)
    for b in range(B):
        for t in range(T):
            keys = [s for s in range(k.shape[1]) if sees(b, t, s)]
            for h in range(H):
                scores = k[b, keys, h // group].double() @ q[b, t, h].double() / K**0.5
                out[b, t, h] = scores.softmax(0) @ v[b, keys, h // group].double()
    return out


def make(B, T, H, G, K, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(B, T, n, K, generator=generator) for n in (H, G, G))


@pytest.mark.parametrize("H, G", [(1, 1), (6, 3), (5, 1), (7, 7)])
def test_causal_attention_equals_a_float64_reference(H, G):
    q, k, v = make(2, 11, H, G, 8)
    expected = naive(q, k, v, lambda b, t, s: s <= t)
    torch.testing.assert_close(causal(0, q, k, v).double(), expected, atol=1e-5, rtol=1e-5)


documents = st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), min_size=1, max_size=3)


@settings(max_examples=25, deadline=None)
@given(rows=documents)
def test_packed_attention_stays_within_documents(rows):
    T = max(map(sum, rows))
    ids = [[i for i, n in enumerate(row) for _ in range(n)] for row in rows]
    documents_BT = torch.tensor([row + [99] * (T - len(row)) for row in ids])
    q, k, v = make(len(rows), T, 4, 2, 6)
    expected = naive(q, k, v, lambda b, t, s: s <= t and documents_BT[b, s] == documents_BT[b, t])
    torch.testing.assert_close(packed(documents_BT)(0, q, k, v).double(), expected, atol=1e-5, rtol=1e-5)
    for b, row in enumerate(documents_BT.tolist()):
        expected_positions, last = [], None
        for i, document in enumerate(row):
            expected_positions.append(expected_positions[-1] + 1 if i and document == last else 0)
            last = document
        assert packed_positions(documents_BT)[b].tolist() == expected_positions


def test_one_document_is_causal():
    q, k, v = make(2, 9, 4, 2, 8)
    torch.testing.assert_close(packed(torch.zeros(2, 9, dtype=torch.long))(0, q, k, v), causal(0, q, k, v))
