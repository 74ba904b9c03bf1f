"""How many draft tokens pay: the arithmetic, and an engine that follows it with invented step times."""

import pytest

from herd.engine import Engine, Request, Sampling
from herd.engine.speculate import DraftTokens
from herd.engine.step_timer import REMEMBERED, StepTimer, best_draft_length, tokens_per_round


def paced(seconds) -> StepTimer:
    timer = StepTimer()
    for n in (1, 2, 5, 8, 16, 80, 96):
        timer.note(n, seconds(n))
    return timer


def test_step_times_are_interpolated():
    timer = StepTimer()
    assert timer.seconds(7) == 0  # nothing is known
    timer.note(4, 2.0)
    timer.note(8, 3.0)
    assert [timer.seconds(n) for n in (4, 6, 8)] == [2, 2.5, 3]
    assert [timer.seconds(n) for n in (2, 40)] == [1, 3]  # as good as could be
    timer.note(4, 1.5)
    timer.note(4, 9.0)  # something else went on
    assert timer.seconds(4) == pytest.approx(1.5 * 1.05)
    assert timer.seconds(17) == timer.seconds(16)


def test_old_step_times_are_forgotten():
    timer = StepTimer()
    timer.note(5, 100.0)
    for _ in range(REMEMBERED):
        timer.note(1, 1.0)
    assert timer.seconds(5) == 100
    timer.note(1, 1.0)
    assert timer.seconds(5) == 1


def test_expected_tokens_of_a_round_are_those_of_the_paper():
    assert tokens_per_round(0.8, 3) == pytest.approx(1 + 0.8 + 0.64 + 0.512)  # Leviathan et al., table 1
    assert (tokens_per_round(1.0, 4), tokens_per_round(0.0, 4)) == (5, 1)


def test_one_user_gains_from_draft_tokens_and_many_users_do_not():
    """A forward reads memory for 1 s or computes for 0.2 s per token. The draft takes 0.1 s."""
    model, draft = paced(lambda n: max(1.0, 0.2 * n)), paced(lambda n: 0.1)
    assert best_draft_length(4, [0.8], 1, model, draft) == 4
    assert best_draft_length(4, [0.3], 1, model, draft) < 4
    assert best_draft_length(4, [0.0], 1, model, draft) == 0
    assert best_draft_length(4, [0.8] * 16, 16, model, draft) == 0
    assert best_draft_length(4, [], 1, model, draft) == 0


class Fixed:
    """A draft that always proposes the same token."""

    def __init__(self, token: int) -> None:
        self.token, self.most = token, []

    def propose(self, rows, most):
        self.most += most
        return [DraftTokens([self.token] * n) for n in most]

    def forget(self, row):
        pass


class Clock(StepTimer):
    """A step timer that returns invented times."""

    def __init__(self, seconds) -> None:
        super().__init__()
        self._tell = seconds

    def note(self, n_tokens, seconds):
        super().note(n_tokens, self._tell(n_tokens))


@pytest.mark.parametrize(
    ("seconds", "sampling", "length"),
    [
        (lambda n: float(n), {}, 0),  # every token costs the same: none of them pays
        (lambda n: 1.0, {}, 4),  # tokens cost nothing: what is hardly ever right is still worth it
        (lambda n: float(n), {"seed": 1}, 4),  # a seed promises its tokens whatever the clock says
    ],
)
def test_the_engine_drafts_as_much_as_its_step_times_suggest(model, seconds, sampling, length):
    draft = Fixed(7)
    request = Request([1, 2, 3], Sampling(max_tokens=60, **sampling))
    plain = Engine(model, None).run([request])[0].ids
    engine = Engine(model, None, draft=draft)
    engine._timers = Clock(seconds), Clock(lambda n: 0.0)
    assert engine.run([request])[0].ids == plain
    assert set(draft.most[20:50]) == {length}
