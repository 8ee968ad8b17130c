"""Pools from a run's samples and from labelled pairs: shares of π_ref, win probabilities, and what is left out."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from scipy.special import expit

from mpo_ray.data.candidate_pools import pool_of_labels, pool_of_scores
from mpo_ray.data.pools import pool_from_table
from mpo_ray.data.score_files import ScoreTableError
from mpo_ray.maths.win_probability import LINKS

REFERENCE = np.array([0.4, 0.3, 0.2, 0.1])
POLICIES = {"good": np.array([0.1, 0.2, 0.3, 0.4]), "short": np.array([0.25, 0.5, 0.2, 0.05])}
REWARDS = {"good": np.array([0.0, 0.5, 1.5, 3.0]), "short": np.array([1.0, 1.0, -1.0, 0.0])}


def scores(drawn: list[dict[str, list[int]]]) -> pa.Table:
    """A score table of a world with four responses; drawn: of each prompt, proposal → the responses it drew."""
    rows = []
    for p, proposals in enumerate(drawn):
        for proposal, responses in proposals.items():
            for response in responses:
                rows.append(
                    {
                        "prompt_id": f"p{p}",
                        "sample_id": len(rows),
                        "proposal": proposal,
                        "prompt_ids": [p],
                        "response_ids": [response],
                        **{f"log_ratio_{n}": float(np.log(q / REFERENCE)[response]) for n, q in POLICIES.items()},
                        **{f"reward_{n}": float(values[response]) for n, values in REWARDS.items()},
                    }
                )
    return pa.Table.from_pylist(rows).take(np.random.default_rng(0).permutation(len(rows)))


def pool(table: pa.Table, candidates: str, link: str = "bradley_terry", scale: float = 1.0) -> pa.Table:
    rewards = {name: f"reward_{name}" for name in POLICIES}
    return pool_of_scores(table, list(POLICIES), candidates=candidates, rewards=rewards, scale=scale, link=LINKS[link])


def test_the_reference_s_samples_count_alike_and_meet_each_other() -> None:
    table = scores([{"reference": [0, 2, 3], "good": [3, 3]}, {"reference": [1, 1]}])
    found = pool(table, "reference", scale=2.0)
    assert found["prompt_id"].to_pylist() == ["p0"] * 3 + ["p1"] * 2
    assert found["response_ids"].to_pylist() == [[0], [2], [3], [1], [1]]
    np.testing.assert_allclose(np.exp(found["log_ref"]), [1 / 3] * 3 + [0.5] * 2)
    np.testing.assert_allclose(found["win_good"][0].as_py(), (expit(-3.0) + expit(-6.0)) / 2)
    np.testing.assert_allclose(found["win_short"].to_numpy()[3:], [0.5, 0.5])
    hard = pool(table, "reference", link="order")
    np.testing.assert_allclose(hard["win_short"].to_numpy(), [1.0, 0.0, 0.5, 0.5, 0.5])


def test_all_samples_estimate_expectations_under_the_reference() -> None:
    """Weighed by π_ref/p̄: each response has its share of π_ref, and p̄ is P(y ≻ y') over y' ∼ π_ref, by enumeration."""
    rng = np.random.default_rng(1)
    drawn = {
        "reference": rng.choice(4, 2000, p=REFERENCE).tolist(),
        **{name: rng.choice(4, 1000, p=policy).tolist() for name, policy in POLICIES.items()},
    }
    found = pool(scores([drawn]), "all")
    responses = np.array(found["response_ids"].to_pylist())[:, 0]
    shares = np.exp(found["log_ref"].to_numpy())
    np.testing.assert_allclose(np.bincount(responses, shares), REFERENCE, atol=0.01)
    for name, rewards in REWARDS.items():
        exact = expit(rewards[:, None] - rewards) @ REFERENCE
        np.testing.assert_allclose(found[f"win_{name}"].to_numpy(), exact[responses], atol=0.01)
    table = pool_from_table(found, "good", ["short"])
    assert float(table.pool.expectation(table.pool.primary)) == pytest.approx(0.5, abs=1e-3)


def test_prompts_with_one_candidate_are_left_out_and_a_pool_of_them_is_refused() -> None:
    table = scores([{"reference": [0]}, {"reference": [1, 2]}, {"good": [1, 2]}])
    assert pool(table, "reference")["prompt_id"].to_pylist() == ["p1", "p1"]
    assert pool(table, "all")["prompt_id"].to_pylist() == ["p1", "p1", "p2", "p2"]
    with pytest.raises(ScoreTableError, match=r"no prompt has two candidates.*samples\.samples_per_prompt"):
        pool(scores([{"reference": [0]}, {"good": [1, 2]}]), "reference")


def pairs(*rows: tuple[int, int, int]) -> pa.Table:
    """(prompt, chosen, rejected)"""
    return pa.table(
        {
            "prompt_ids": [[p] for p, _, _ in rows],
            "chosen_ids": [[c] for _, c, _ in rows],
            "rejected_ids": [[r] for _, _, r in rows],
        }
    )


def test_labels_make_a_pool_of_the_responses_that_every_objective_compares() -> None:
    """p̄ is the share of comparisons won; response 9 is judged by one objective, and prompt 2 has one other left."""
    labelled = {
        "good": pairs((1, 10, 11), (1, 10, 12), (1, 12, 11), (2, 20, 21), (3, 30, 31)),
        "short": pairs((1, 11, 10), (1, 12, 10), (1, 11, 12), (2, 20, 9), (3, 31, 30)),
    }
    found = pool_of_labels(labelled)
    rows = {
        (prompt[0], response[0]): (good, short)
        for prompt, response, good, short in zip(
            *(found[c].to_pylist() for c in ("prompt_ids", "response_ids", "win_good", "win_short")), strict=True
        )
    }
    assert rows == {(1, 10): (1.0, 0.0), (1, 11): (0.0, 1.0), (1, 12): (0.5, 0.5), (3, 30): (1, 0), (3, 31): (0, 1)}
    errors = dict(zip(map(tuple, found["response_ids"].to_pylist()), found["error_good"].to_pylist(), strict=True))
    assert errors[(12,)] == pytest.approx(np.sqrt(0.25 / 2))
    table = pool_from_table(found, "good", ["short"])
    assert table.pool.num_prompts == 2
    np.testing.assert_allclose(np.exp(table.pool.log_reference), [1 / 3] * 3 + [0.5] * 2)


def test_objectives_that_label_different_pairs_make_no_pool() -> None:
    with pytest.raises(ScoreTableError, match="pairs that good and short label alike: no prompt has two candidates"):
        pool_of_labels({"good": pairs((1, 10, 11)), "short": pairs((2, 20, 21))})
