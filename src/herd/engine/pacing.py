"""Bound the prompt tokens of a step by time, so that long prompts slow down the other answers only so much.

A step that computes a piece of a prompt takes longer than one that only decodes, and everybody's next token
waits for it. Many small pieces keep that delay short but use the machine worse. So the piece is as large as
the allowed slowdown permits, on this machine and for this model, which is measured while it runs. Sizes then
depend on a clock. Without a pacer they do not (`MIXED_TOKENS`, `PREFILL_TOKENS`), and the engine repeats the
very same forwards for the same requests.
"""

from __future__ import annotations

from .memory import PREFILL_TOKENS

MIXED_TOKENS = 256
"""Prompt tokens of a step in which other sequences decode, without a pacer."""
SLOWDOWN = 2.5
"""Duration of a step with decoding and a piece of one prompt, as a multiple of one that only decodes."""
LONGEST_SECONDS = 1.0
"""Duration of a step without decoding sequences. A request that arrives meanwhile waits for its end."""
FIRST_TOKENS, FEWEST_TOKENS = 256, 8
"""Size of a piece before any was measured, and the least size, which a slow machine may not go below."""
PROBE_STEPS = 32
"""Mixed steps after which one step decodes only, to measure again how long that takes."""
UPDATE = 0.3
"""Weight of the latest measurement in a running mean."""


class Pacer:
    """Sizes of pieces of prompts from the durations of recent steps."""

    def __init__(self) -> None:
        self._decode_seconds = 0.0  # of a step that only decodes, 0 if not known
        # of one more prompt token, with or without decoding: the running means of it and its deviations
        self._token_seconds, self._deviation = {True: 0.0, False: 0.0}, {True: 0.0, False: 0.0}
        self._mixed = 0

    def room(self, decoding: bool, n_prompts: int = 1) -> int:
        """Return the number of prompt tokens for the next step, or 0 if it should only decode.

        Each of the ``n_prompts`` may slow down a step that decodes by `SLOWDOWN`: they are computed together,
        because the sooner they end, the more sequences share the steps that decode.
        """
        seconds = LONGEST_SECONDS
        if decoding:
            if not self._decode_seconds or self._mixed >= PROBE_STEPS:
                return 0
            seconds = n_prompts * (SLOWDOWN - 1) * self._decode_seconds
        known = decoding if self._token_seconds[decoding] else not decoding
        # on a machine that others use too, times vary: allow for it, as TCP does for the time of a round trip
        cost = self._token_seconds[known] + self._deviation[known]
        if not cost:
            return FIRST_TOKENS
        return max(FEWEST_TOKENS, min(PREFILL_TOKENS, int(seconds / cost)))

    def note(self, n_decoding: int, n_prompt: int, seconds: float) -> None:
        """Record that a step took ``seconds``, with these numbers of decoding sequences and prompt tokens."""
        if not n_prompt:
            self._mixed = 0
            self._decode_seconds = _mean(self._decode_seconds, seconds)
            return
        if n_decoding:
            self._mixed += 1
            seconds = max(seconds - self._decode_seconds, 0.1 * seconds)
        decoding = n_decoding > 0
        cost, mean = seconds / n_prompt, self._token_seconds[decoding]
        self._deviation[decoding] += UPDATE * (
            (abs(cost - mean) if mean else 0.0) - self._deviation[decoding]
        )
        self._token_seconds[decoding] = _mean(mean, cost)


def _mean(mean: float, latest: float) -> float:
    """Return a running mean after one more measurement. A ``mean`` of 0 means that there was none."""
    return mean + UPDATE * (latest - mean) if mean else latest
