"""Streamed text has whole characters only, and stop strings are found wherever they are cut."""

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from herd.engine.detokenize import TextStream


class Pieces:
    """A tokenizer whose tokens are given byte strings."""

    def __init__(self, pieces):
        self.pieces = pieces

    def decode_bytes(self, ids, *, skip_special=False):
        return b"".join(self.pieces[i] for i in ids)


def reference(text: str, stops) -> str:
    """Return the text up to the stop string that is complete first."""
    for end in range(len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end - len(stop)]
    return text


@settings(max_examples=300, deadline=None)
@given(
    st.text(alphabet="abcé語😀", max_size=30),
    st.lists(st.text(alphabet="abcé語😀", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(0, 60), max_size=12),
)
def test_text_does_not_depend_on_how_it_was_cut(text, stops, cuts):
    data = text.encode()
    edges = [0, *sorted(min(c, len(data)) for c in cuts), len(data)]
    pieces = [data[a:b] for a, b in pairwise(edges)]
    stream, out = TextStream(Pieces(pieces), tuple(stops)), ""
    for i in range(len(pieces)):
        out += stream.feed(i)
        assert text.startswith(out)
        if stream.stopped:
            break
    out += stream.finish()
    assert out == reference(text, stops)
    assert stream.stopped == (out != text)


def test_text_is_released_as_soon_as_it_cannot_be_a_stop_string():
    stream = TextStream(Pieces([b"abx", b"ab", b"a", b"bc"]), ("abc",))
    assert [stream.feed(i) for i in range(3)] == ["abx", "", "ab"]
    assert (stream.feed(3), stream.stopped, stream.finish()) == ("", True, "")


def test_a_broken_character_becomes_u_fffd():
    stream = TextStream(Pieces(["語".encode()[:2], b"a"]))
    assert (stream.feed(0), stream.feed(1), stream.finish()) == ("", "\ufffda", "")
    stream.feed(0)
    assert stream.finish() == "\ufffd"


def test_a_broken_character_can_complete_a_stop_string():
    stream = TextStream(Pieces([b"ab\xe8"]), ("b\ufffd",))
    assert (stream.feed(0), stream.finish(), stream.stopped) == ("a", "", True)
