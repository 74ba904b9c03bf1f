"""Pieces of shared chunks: as many bytes as asked for, none in two, given back when all are gone."""

import gc
import weakref

import torch
from hypothesis import given
from hypothesis import strategies as st

from herd.kernels.large_pages import LINE, Chunks, reserve


@given(sizes=st.lists(st.integers(0, 5000), max_size=20))
def test_pieces_do_not_overlap(sizes):
    chunks = Chunks(4096)
    pieces = [chunks.piece(n) for n in sizes]
    for number, piece in enumerate(pieces):
        assert piece.data_ptr() % LINE == 0 or not len(piece)
        piece.fill_(number)
    assert [len(piece) for piece in pieces] == sizes
    assert all((piece == number).all() for number, piece in enumerate(pieces))


def test_a_chunk_lives_as_long_as_a_piece_of_it():
    chunks = Chunks(1024)
    first, second = chunks.piece(512), chunks.piece(512)
    gone = weakref.ref(first.untyped_storage())
    chunks.piece(512)  # begins another chunk
    del first, second
    gc.collect()
    assert gone() is None


def test_a_closed_chunk_is_not_shared_with_later_pieces():
    chunks = Chunks(1024)
    first = chunks.piece(512)
    gone = weakref.ref(first.untyped_storage())
    chunks.close()
    later = chunks.piece(512)
    del first
    gc.collect()
    assert gone() is None
    assert not later.any()


def test_reserved_memory_is_zero():
    assert torch.equal(reserve(5000), torch.zeros(5000, dtype=torch.uint8))
