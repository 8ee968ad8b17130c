"""Requests come, go and are aborted in any order: every row comes back, and every request is told its end once."""

from __future__ import annotations

import numpy as np
import pytest

from mpo_ray.decoding.branch import Piece, Predictions
from mpo_ray.decoding.protocol import (
    Delta,
    EngineError,
    GenerationRequest,
    Mode,
    NothingAcceptedError,
    QueueFullError,
    RequestError,
    Sampling,
)
from tests.world import PROMPT_TOKEN, random_table
from tests.world_runner import WorldRunner, drain, engine_of

RNG = np.random.default_rng(0)
TABLES = [random_table(4, 6, spread=1.0, rng=RNG) for _ in range(3)]
MODES = (Mode(), Mode(), Mode("smc", 4), Mode("rejection", 3, 20))
PROMPT = (PROMPT_TOKEN,)


def asked(number: int, mode: Mode = MODES[0], max_tokens: int = 6, **weights: float) -> GenerationRequest:
    return GenerationRequest(str(number), PROMPT, Sampling(max_tokens, seed=number), mode, weights or None)


def test_ten_thousand_random_aborts_leak_nothing() -> None:
    """Submits, steps and aborts at random, of waiting, running and unknown requests, in all modes, with few rows."""
    engine = engine_of(TABLES, num_rows=24, max_waiting=30)
    rng = np.random.default_rng(1)
    open_requests: set[str] = set()
    ended: dict[str, int] = {}
    aborts = number = 0
    while aborts < 10_000:
        action = rng.random()
        if action < 0.45:
            number += 1
            mode = MODES[rng.integers(len(MODES))]
            weights = {"0": 1.0} if mode.kind == "token" and rng.random() < 0.3 else {}
            try:
                engine.submit(asked(number, mode, **weights))
                open_requests.add(str(number))
            except QueueFullError:
                number -= 1
        elif action < 0.9:
            aborts += 1
            name = str(rng.integers(1, number + 2))
            assert engine.abort(name) == (name in open_requests)
            open_requests.discard(name)
        else:
            for name, item in engine.step():
                assert name in open_requests
                if isinstance(item, Exception) or item.finish_reason is not None:
                    assert not isinstance(item, EngineError)
                    ended[name] = ended.get(name, 0) + 1
                    open_requests.remove(name)
        now = engine.statistics()
        assert now.kv_blocks_used <= 24
        assert now.running + now.waiting == len(open_requests)
    for name in open_requests:
        assert engine.abort(name)
    now = engine.statistics()
    assert (now.running, now.waiting, now.kv_blocks_used) == (0, 0, 0)
    assert now.finished > 100
    assert set(ended.values()) == {1}
    fresh = engine_of(TABLES)
    for one in (engine, fresh):
        one.submit(asked(1))
    assert drain(engine) == drain(fresh)


def test_what_is_admitted_has_all_the_rows_that_it_will_need() -> None:
    """Twelve rows hold four token-mode requests of three policies, or one of four particles: others wait in order."""
    engine = engine_of(TABLES, num_rows=12)
    for number in range(6):
        engine.submit(asked(number))
    engine.submit(asked(6, Mode("smc", 4)))
    engine.submit(asked(7, **{"0": 1.0}))
    first = engine.step()
    now = engine.statistics()
    assert (now.running + now.finished, now.waiting) == (4, 4)
    assert {name for name, _ in first} == {"0", "1", "2", "3"}
    assert {*drain(engine)} >= {"4", "5", "6", "7"}


def test_a_full_queue_and_a_known_id_are_refused_and_nothing_is_lost() -> None:
    engine = engine_of(TABLES, num_rows=3, max_waiting=2)
    engine.submit(asked(0))
    engine.step()
    engine.submit(asked(1))
    with pytest.raises(RequestError, match="id '1' is being served"):
        engine.submit(asked(1))
    engine.submit(asked(2))
    with pytest.raises(QueueFullError, match="2 requests are waiting"):
        engine.submit(asked(3))
    assert {*drain(engine)} >= {"1", "2"}


@pytest.mark.parametrize(
    ("request_", "param", "complaint"),
    [
        (asked(1, max_tokens=64), "prompt", "context is 64 tokens"),
        (GenerationRequest("1", (), Sampling(2)), "prompt", "no tokens"),
        (GenerationRequest("1", (9,), Sampling(2)), "prompt", "token id 9 is not in the vocabulary of 4"),
        (GenerationRequest("1", PROMPT, Sampling(2, temperature=-1.0)), "temperature", "temperature is -1.0"),
        (GenerationRequest("1", PROMPT, Sampling(2, top_p=0.0)), "top_p", "above 0 and at most 1"),
        (GenerationRequest("1", PROMPT, Sampling(2, top_k=-2)), "top_k", "or more"),
        (GenerationRequest("1", PROMPT, Sampling(2, min_tokens=3)), "min_tokens", "between 0 and max_tokens"),
        (GenerationRequest("1", PROMPT, Sampling(2, stop=("",))), "stop", "empty stop string"),
        (GenerationRequest("1", PROMPT, Sampling(2, stop_ids=(4,))), "stop_token_ids", "token id 4"),
        (GenerationRequest("1", PROMPT, Sampling(2, logit_bias={-1: 1.0})), "logit_bias", "token id -1"),
        (GenerationRequest("1", PROMPT, Sampling(2, logit_bias={1: np.inf})), "logit_bias", "finite"),
        (asked(1, none=1.0), "weights", "no objective 'none'; there are 0, 1, 2"),
        (asked(1, **{"0": np.nan}), "weights", "finite"),
        (asked(1, **{"0": 0.0}), "weights", "not 0"),
        (asked(1, Mode("token", 2)), "particles", "token mode has 1"),
        (asked(1, Mode("smc", 0)), "mode", "1 or more"),
        (asked(1, Mode("smc", 9)), "particles", "there are not as many rows"),
        (
            GenerationRequest("1", PROMPT, Sampling(2, top_p=0.5), Mode("smc", 2)),
            "top_p",
            "no meaning for the sequence",
        ),
        (GenerationRequest("1", PROMPT, Sampling(2, min_tokens=1), Mode("smc", 2)), "min_tokens", "no meaning"),
        (GenerationRequest("1", PROMPT, Sampling(2, temperature=0.0), Mode("smc", 2)), "temperature", "likeliest"),
        (GenerationRequest("1", PROMPT, Sampling(0), Mode("smc", 2)), "max_tokens", "at least one token"),
        (
            GenerationRequest("1", PROMPT, Sampling(2, temperature=1.5), Mode("rejection")),
            "temperature",
            "sum to 0.667",
        ),
        (asked(1, Mode("rejection"), **{"0": 2.0, "1": -1.0}), "temperature", "not negative"),
    ],
)
def test_what_cannot_be_served_is_refused_before_it_waits(
    request_: GenerationRequest, param: str, complaint: str
) -> None:
    engine = engine_of(TABLES, num_rows=24)
    with pytest.raises(RequestError, match=complaint) as refused:
        engine.submit(request_)
    assert refused.value.param == param
    assert not engine.has_work


def test_rejection_says_when_it_gives_up() -> None:
    """λ = 8 on each policy: Z is far below 1/5."""
    engine = engine_of(TABLES, num_rows=24)
    engine.submit(asked(1, Mode("rejection", 2, 5), **{"0": 8.0, "1": 8.0, "2": 8.0}))
    errors = [item for _ in range(8) for _, item in engine.step()]
    assert [type(error) for error in errors] == [NothingAcceptedError]
    assert "5 attempts were made and none was accepted" in str(errors[0])
    assert engine.statistics().kv_blocks_used == 0


class _Faulty(WorldRunner):
    """A model that fails for one prompt, as on a broken row; whoever is in the same pass fails with it."""

    def run(self, pieces: list[Piece]) -> Predictions:  # type: ignore[override]
        if any(3 in piece.tokens for piece in pieces if piece.start == 0):
            raise RuntimeError("a kernel failed")
        return super().run(pieces)


def test_a_pass_that_fails_ends_the_request_that_fails_alone_and_no_other() -> None:
    engine = engine_of(TABLES, num_rows=24)
    expected = engine_of(TABLES, num_rows=24)
    expected.submit(asked(1))
    engine._runner = _Faulty(TABLES, 24)
    engine.submit(asked(1))
    engine.submit(GenerationRequest("2", (3,), Sampling(2)))
    told: dict[str, list[Delta | Exception]] = {}
    while engine.has_work:
        for name, item in engine.step():
            told.setdefault(name, []).append(item)
    assert told["1"] == drain(expected)["1"]
    assert isinstance(told["2"][0], EngineError)
    assert engine.statistics().kv_blocks_used == 0


def test_weights_can_be_changed_for_requests_to_come() -> None:
    engine = engine_of(TABLES)
    engine.submit(asked(1))
    engine.step()
    engine.set_weights({"1": 1.0})
    engine.submit(asked(2))
    told = drain(engine)
    first, second = (told[name][-1].diagnostics for name in ("1", "2"))
    assert first is not None
    assert first.weights == pytest.approx({"0": 1 / 3, "1": 1 / 3, "2": 1 / 3})
    assert second is not None
    assert second.weights == {"0": 0.0, "1": 1.0, "2": 0.0}
    with pytest.raises(ValueError, match="weights"):
        engine.set_weights({"1": 0.5})
