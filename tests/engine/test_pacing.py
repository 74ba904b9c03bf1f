"""Pieces of prompts on imaginary machines whose steps take a known time."""

import pytest

from herd.engine import Engine, Request, Sampling
from herd.engine.memory import PREFILL_TOKENS
from herd.engine.pacing import FEWEST_TOKENS, LONGEST_SECONDS, PROBE_STEPS, SLOWDOWN, Pacer


def run(
    pacer: Pacer, decode: float, token: float, steps: int, decoding: bool = True
) -> list[tuple[int, float]]:
    """Return the prompt tokens and the duration of each step on a machine with these seconds."""
    taken = []
    for _ in range(steps):
        n = pacer.room(decoding)
        seconds = decode * decoding + token * n
        pacer.note(4 * decoding, n, seconds)
        taken.append((n, seconds))
    return taken


@pytest.mark.parametrize("decode", [0.002, 0.05, 0.4])
@pytest.mark.parametrize("tokens_per_decode", [10, 100, 1000])
def test_a_step_with_a_piece_is_slower_by_the_allowed_factor(decode, tokens_per_decode):
    token = decode / tokens_per_decode
    steps = run(Pacer(), decode, token, 200)[10:]
    mixed = [(n, seconds) for n, seconds in steps if n]
    assert len(mixed) >= len(steps) * (1 - 2 / PROBE_STEPS)
    for n, seconds in mixed:
        assert n == PREFILL_TOKENS or seconds == pytest.approx(SLOWDOWN * decode, rel=0.1)
        assert seconds <= SLOWDOWN * decode * 1.01


def test_prompts_that_come_together_may_each_slow_down_the_others():
    pacer = Pacer()
    run(pacer, 0.05, 0.001, 200)
    one, three = (pacer.room(True, n) for n in (1, 3))
    assert three == pytest.approx(3 * one, rel=0.05)


class Watched(Pacer):
    """A pacer that notes the numbers of prompts that it is told."""

    def __init__(self):
        super().__init__()
        self.told = []

    def room(self, decoding, n_prompts=1):
        self.told.append(n_prompts)
        return super().room(decoding, n_prompts)


@pytest.mark.parametrize(
    "decoding, prompts, told", [("a", "aaa", 3), ("a", "bbb", 1), ("a", "bbc", 2), ("b", "bbc", 2)]
)
def test_a_flood_of_one_owner_counts_as_one_prompt_beside_others(model, decoding, prompts, told):
    engine = Engine(model, None, max_batch=8)
    engine.submit(Request([1, 2], Sampling(max_tokens=50), owner=decoding))
    while not engine.n_decoded:
        engine.step()
    engine.pacer = Watched()
    for owner in prompts:
        engine.submit(Request([3, 4, 5, 6], Sampling(max_tokens=1), owner=owner))
    engine.step()
    assert engine.pacer.told == [told]


def test_it_follows_a_machine_that_becomes_slower_and_faster():
    pacer = Pacer()
    run(pacer, 0.01, 0.0001, 100)
    for decode, token in ((0.03, 0.001), (0.01, 0.0001)):
        last = run(pacer, decode, token, 400)[-1 - PROBE_STEPS // 2 :]
        assert sum(seconds for n, seconds in last if n) / len(last) == pytest.approx(
            SLOWDOWN * decode, rel=0.2
        )


def test_pieces_are_smaller_if_times_vary():
    """Other programs double the time of every second step: few steps exceed the allowed factor by half."""
    pacer, mixed = Pacer(), []
    for step in range(400):
        n, slow = pacer.room(True), 1 + step % 2
        seconds = slow * (0.05 + 0.001 * n)
        pacer.note(4, n, seconds)
        mixed += [seconds] * (n > 0)
    late = sorted(mixed[50:])
    assert late[int(0.95 * len(late))] <= 1.5 * SLOWDOWN * 0.075
    assert late[len(late) // 2] >= SLOWDOWN * 0.075 / 2


def test_without_other_answers_a_step_takes_a_second_at_most():
    for token in (1e-2, 1e-3):
        assert run(Pacer(), 0.0, token, 20, decoding=False)[-1][1] == pytest.approx(LONGEST_SECONDS, rel=0.05)
    assert run(Pacer(), 0.0, 1e-9, 20, decoding=False)[-1][0] == PREFILL_TOKENS
    assert run(Pacer(), 0.0, 10.0, 20, decoding=False)[-1][0] == FEWEST_TOKENS


def test_a_prompt_always_goes_on():
    """Even if one token of it takes far longer than a step that decodes."""
    steps = run(Pacer(), 0.001, 1.0, 100)
    assert sum(n for n, _ in steps) >= FEWEST_TOKENS * 90
