"""Deltas joined: nothing is lost or moved, and nothing waits that should not."""

from __future__ import annotations

import pytest

from mpo_ray.decoding import pace
from mpo_ray.decoding.pace import Pace
from mpo_ray.decoding.protocol import Delta, Diagnostics, TokenLogprob


def one(token: int, **fields: object) -> Delta:
    return Delta((token,), f"{token} ", (TokenLogprob(token, -1.0),), **fields)  # type: ignore[arg-type]


def test_deltas_are_told_when_they_hold_as_many_tokens_as_are_wanted() -> None:
    """The first at once; a wish counts from the next delta on; the end comes with what is left."""
    wishes = iter([3.0, 2.0, 5.0, 5.0])
    paced = Pace(lambda: next(wishes))
    report = Diagnostics("token", {"helpful": 1.0}, -2.0)
    last = one(7, finish_reason="stop", stop="END", diagnostics=report)
    told = [paced.add(delta) for delta in [one(1, prompt_logprobs=(None,)), *map(one, range(2, 7)), last]]
    assert [None if delta is None else delta.tokens for delta in told] == [
        (1,), None, None, (2, 3, 4), None, (5, 6), (7,)
    ]  # fmt: skip
    assert told[0] == one(1, prompt_logprobs=(None,))
    assert told[3] == Delta((2, 3, 4), "2 3 4 ", tuple(TokenLogprob(token, -1.0) for token in (2, 3, 4)))
    assert told[6] == last


def test_what_is_held_comes_before_an_error() -> None:
    paced = Pace(lambda: 10.0)
    assert paced.add(one(1)) == one(1)
    assert [paced.add(one(2)), paced.add(one(3))] == [None, None]
    assert paced.rest() == Delta((2, 3), "2 3 ", (TokenLogprob(2, -1.0), TokenLogprob(3, -1.0)))
    assert paced.rest() is None


def test_no_token_waits_longer_than_the_longest_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(pace.time, "monotonic", lambda: now)
    paced = Pace(lambda: 10.0)
    paced.add(one(1))
    now += 0.9 * pace.LONGEST_WAIT
    assert paced.add(one(2)) is None
    now += 0.2 * pace.LONGEST_WAIT
    assert paced.add(one(3)) == Delta((2, 3), "2 3 ", (TokenLogprob(2, -1.0), TokenLogprob(3, -1.0)))
