"""Circuit breakers: an agent that keeps a control loop waiting is not waited for any more.

A server that hangs costs every step of its team the whole deadline, for as long as it hangs. So when the deadline
has passed a few times in a row, the circuit is open: the fallback acts at once, and the agent is asked in the
background. An answer in time closes the circuit again. A server that is gone fails at once, costs no deadline, and
opens no circuit.
"""

from __future__ import annotations

from omcda_deploy.errors import MissedAnswerError

MISSES = 3  # in a row
LONG_MISS_S = 1.0  # or one that took so long


class NotAwaitedError(MissedAnswerError):
    """A step that did not wait for its answer, as the circuit is open."""


class Circuit:
    """The circuit of one model. ``breaks``: False where nobody could act in its place, so that it never opens."""

    def __init__(self, breaks: bool) -> None:
        self._breaks = breaks
        self._misses = 0
        self.open = False

    def miss(self, waited_s: float) -> None:
        """Note that the deadline passed without an answer, after ``waited_s`` seconds."""
        self._misses += 1
        if self._breaks and (self._misses >= MISSES or waited_s >= LONG_MISS_S):
            self.open = True

    def close(self) -> None:
        """Note an answer in time."""
        self._misses, self.open = 0, False
