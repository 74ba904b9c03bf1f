"""As many guesses as pay: the arithmetic, and an engine that follows it under clocks made up."""

import pytest

from herd.engine import Engine, Request, Sampling
from herd.engine.pace import REMEMBERED, Pace, best_guesses
from herd.engine.speculate import Guess


def paced(seconds) -> Pace:
    pace = Pace()
    for n in (1, 2, 5, 8, 16, 80, 96):
        pace.note(n, seconds(n))
    return pace


def test_seconds():
    pace = Pace()
    assert pace.seconds(7) == 0  # nothing is known
    pace.note(4, 2.0)
    pace.note(8, 3.0)
    assert [pace.seconds(n) for n in (4, 6, 8)] == [2, 2.5, 3]
    assert [pace.seconds(n) for n in (2, 40)] == [1, 3]  # as good as could be
    pace.note(4, 1.5)
    pace.note(4, 9.0)  # something else went on
    assert pace.seconds(4) == pytest.approx(1.5 * 1.05)
    assert pace.seconds(17) == pace.seconds(16)


def test_what_is_old_is_forgotten():
    pace = Pace()
    pace.note(5, 100.0)
    for _ in range(REMEMBERED):
        pace.note(1, 1.0)
    assert pace.seconds(5) == 100
    pace.note(1, 1.0)
    assert pace.seconds(5) == 1


def test_one_user_wants_guesses_and_a_crowd_does_not():
    """A forward that reads memory for a second, or computes 0.2 s a token; a draft of a tenth of a second."""
    model, draft = paced(lambda n: max(1.0, 0.2 * n)), paced(lambda n: 0.1)
    assert best_guesses(4, [0.8], 1, model, draft) == 4
    assert best_guesses(4, [0.3], 1, model, draft) < 4
    assert best_guesses(4, [0.0], 1, model, draft) == 0
    assert best_guesses(4, [0.8] * 16, 16, model, draft) == 0
    assert best_guesses(4, [], 1, model, draft) == 0


class Fixed:
    """Always the same guess, right or wrong."""

    def __init__(self, token: int) -> None:
        self.token, self.most = token, []

    def guess(self, rows, most):
        self.most += most
        return [Guess([self.token] * n) for n in most]

    def forget(self, row):
        pass


class Clock(Pace):
    """Tells other times than those it is told."""

    def __init__(self, seconds) -> None:
        super().__init__()
        self._tell = seconds

    def note(self, n_tokens, seconds):
        super().note(n_tokens, self._tell(n_tokens))


@pytest.mark.parametrize(
    ("seconds", "sampling", "guesses"),
    [
        (lambda n: float(n), {}, 0),  # every token costs the same: none of them pays
        (lambda n: 1.0, {}, 4),  # tokens cost nothing: what is hardly ever right is still worth it
        (lambda n: float(n), {"seed": 1}, 4),  # a seed promises its tokens whatever the clock says
    ],
)
def test_the_engine_follows_its_clock(model, seconds, sampling, guesses):
    draft = Fixed(7)
    request = Request([1, 2, 3], Sampling(max_tokens=60, **sampling))
    plain = Engine(model, None).run([request])[0].ids
    engine = Engine(model, None, draft=draft)
    engine._paces = Clock(seconds), Clock(lambda n: 0.0)
    assert engine.run([request])[0].ids == plain
    assert set(draft.most[20:50]) == {guesses}
