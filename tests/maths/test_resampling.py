"""Weighted particles: their effective number, and that resampling keeps every share."""

from __future__ import annotations

import pytest
import torch

from mpo_ray.maths.resampling import drawn_particle, effective_number, log_mean_weight, systematic_ancestors


def test_the_effective_number_is_all_for_even_weights_and_one_for_a_single_one() -> None:
    log_weights = torch.tensor([[3.0, 3.0, 3.0, 3.0], [-700.0, 0.0, -700.0, -700.0], [0.0, 0.0, -900.0, -900.0]])
    torch.testing.assert_close(effective_number(log_weights.double()), torch.tensor([4.0, 1.0, 2.0]).double())
    torch.testing.assert_close(log_mean_weight(log_weights.double())[0], torch.tensor(3.0).double())


def test_every_particle_is_drawn_its_share_of_times_rounded_down_or_up_and_its_share_on_average() -> None:
    """⌊N w⌋ ≤ count ≤ ⌈N w⌉, and the mean over shifts is N w."""
    weights = torch.tensor([[0.05, 0.4, 0.1, 0.45]]).double()
    shifts = (torch.arange(2000) + 0.5) / 2000
    ancestors = systematic_ancestors(weights.log().expand(2000, 4), shifts)
    counts = torch.stack([(ancestors == n).sum(1) for n in range(4)], dim=1).double()
    assert (counts >= torch.floor(4 * weights)).all()
    assert (counts <= torch.ceil(4 * weights)).all()
    torch.testing.assert_close(counts.mean(0), 4 * weights[0], atol=2e-3, rtol=0.0)
    assert (ancestors.diff(dim=1) >= 0).all()


def test_one_particle_is_drawn_in_proportion_to_its_weight() -> None:
    weights = torch.tensor([0.2, 0.0, 0.7, 0.1]).double()
    uniforms = (torch.arange(1000) + 0.5) / 1000
    chosen = drawn_particle(weights.log().expand(1000, 4), uniforms)
    shares = torch.bincount(chosen, minlength=4).double() / 1000
    assert shares.tolist() == pytest.approx(weights.tolist(), abs=2e-3)
