"""DPO, IPO and the reward that a policy is: the shared vectors, and what the losses are minimised by."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mpo_ray.maths.preference_losses import dpo_loss, implicit_reward, ipo_loss
from tests.world import World


def test_losses_and_rewards_equal_the_shared_vectors(shared: Path) -> None:
    """dpo = −log σ(β h), ipo = (h − 1/(2β))², r̃ = β ℓ."""
    for case in json.loads((shared / "vectors" / "losses.json").read_text())["cases"]:
        chosen = torch.tensor([case["policy_chosen"] - case["reference_chosen"]], dtype=torch.float64)
        rejected = torch.tensor([case["policy_rejected"] - case["reference_rejected"]], dtype=torch.float64)
        beta = case["beta"]
        assert dpo_loss(chosen, rejected, beta).item() == pytest.approx(case["dpo"], rel=1e-9)
        assert ipo_loss(chosen, rejected, beta).item() == pytest.approx(case["ipo"], rel=1e-9)
        assert implicit_reward(chosen, beta).item() == pytest.approx(case["chosen_reward"], rel=1e-9)
        assert implicit_reward(rejected, beta).item() == pytest.approx(case["rejected_reward"], rel=1e-9)


def test_dpo_is_least_where_the_implicit_reward_explains_the_preferences() -> None:
    """With P(chosen) = σ(r), E[loss](h) = σ(r) dpo(h) + σ(−r) dpo(−h) has its minimum where β h = r."""
    beta, reward_difference = 0.3, 0.9
    half = torch.linspace(-6, 6, 4001, dtype=torch.float64)
    zero = torch.zeros_like(half)
    preferred = torch.sigmoid(torch.tensor(reward_difference, dtype=torch.float64))
    expected = preferred * dpo_loss(half, zero, beta) + (1 - preferred) * dpo_loss(zero, half, beta)
    assert beta * half[expected.argmin()].item() == pytest.approx(reward_difference, abs=1e-3)


def test_ipo_is_least_at_a_finite_margin() -> None:
    """(h − 1/(2β))² = 0 exactly at h = 1/(2β), and grows again beyond it."""
    beta = torch.tensor(0.25, dtype=torch.float64).item()
    margins = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    losses = ipo_loss(margins + 5.0, torch.full_like(margins, 5.0), beta)
    assert losses.tolist() == pytest.approx([1.0, 0.0, 1.0])


def test_dpo_stays_finite_where_the_margin_is_huge() -> None:
    """−log σ(z) → −z as z → −∞ and → 0 as z → ∞, without overflow."""
    extreme = torch.tensor([-1e5, 1e5])
    assert dpo_loss(extreme, torch.zeros(2), 1.0).tolist() == [1e5, 0.0]


def test_the_implicit_reward_is_normalised_under_the_reference() -> None:
    """E_{y∼π_ref} exp(r̃(y)/β) = 1 for every policy (design 2.1, eq. 1)."""
    world = World.random(3)
    beta = 0.7
    rewards = implicit_reward(torch.tensor(world.log_ratios), beta).numpy()
    means = np.exp(world.log_reference) @ np.exp(rewards / beta)
    np.testing.assert_allclose(means, 1.0, rtol=1e-12)
