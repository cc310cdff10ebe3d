"""What a receiver does about a NaN or an infinity: leaves it out, and tells whose it was.

One NaN that is averaged is a NaN on two ranks, on four a step later, and on all within one period
of the schedule. The receiver decides, since it sees the values in the pass that mixes them; a
sender would need a pass of its own, and would have to tell its partner that nothing comes. The
unit is a chunk of the engine (`Tuning.chunk`, or `device_chunk`). Rejected: leaving out single
elements (what stands beside a NaN is seldom worth more than it), or whole rounds (the first chunk
is mixed before the last has come).
"""

from __future__ import annotations

import logging
import time

from ucxgossip.errors import ArgumentError, NonFiniteError

POLICIES = ("skip", "raise", "allow")
"""Leave out and count; leave out and raise `NonFiniteError`; mix whatever comes."""

_LOG = logging.getLogger("ucxgossip")
_QUIET_S = 1.0


def check_policy(policy: object) -> None:
    """`ArgumentError` for what is none of `POLICIES`."""
    if not isinstance(policy, str) or policy not in POLICIES:
        known = ", ".join(repr(each) for each in POLICIES)
        raise ArgumentError(f"unknown nonfinite {policy!r}; choose one of {known}")


class Quarantine:
    """Counts and tells what was left out.

    counts: chunks left out by the rank whose values were not finite, this one's own included.
    step: optimizer steps done, for messages.
    """

    def __init__(self, policy: str = "skip") -> None:
        check_policy(policy)
        self.policy = policy
        self.counts: dict[int, int] = {}
        self.step = 0
        self._told = -_QUIET_S

    @property
    def whole(self) -> bool:
        """Whether chunks that are not finite are left out."""
        return self.policy != "allow"

    def left_out(
        self,
        here: int,
        found: dict[int, int],
        what: str,
        step: int | None = None,
        policy: str | None = None,
    ) -> None:
        """Rank `here` left out `found[r]` chunks because of rank r's values.

        what: the kind of payload. step, policy: other than this quarantine's. A warning at most
        once a second, or with the policy ``"raise"`` a `NonFiniteError`.
        """
        step = self.step if step is None else step
        found = {rank: chunks for rank, chunks in found.items() if chunks}
        if not found:
            return
        for rank, chunks in found.items():
            self.counts[rank] = self.counts.get(rank, 0) + chunks
        rank = next(iter(found))
        whose = " and ".join("its own" if each == here else f"rank {each}'s" for each in found)
        chunks = sum(found.values())
        message = (
            f"rank {here}, step {step}: {whose} {what} held NaN or Inf "
            f"({chunks} chunk{'' if chunks == 1 else 's'}), and nothing was mixed there"
        )
        if (policy or self.policy) == "raise":
            raise NonFiniteError(
                f"{message}. Look for its cause on that rank (rate, data, overflow); "
                "nonfinite='skip' goes on without them",
                rank,
                what,
                step,
            )
        now = time.monotonic()
        if now - self._told >= _QUIET_S:
            self._told = now
            _LOG.warning("%s; so far, by rank: %s", message, dict(sorted(self.counts.items())))
