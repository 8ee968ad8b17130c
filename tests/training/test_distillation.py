"""Distillation's loss and the engine of one process, on a real model, against separately computed figures."""

from pathlib import Path

import pytest
import torch

from mpo_ray.maths.sequence_logprob import token_kl
from mpo_ray.policies.loading import load_model
from mpo_ray.training.completion_model import CompletionModel
from mpo_ray.training.distillation import distillation_loss
from mpo_ray.training.local_engine import LocalEngine
from mpo_ray.training.sft import Example
from tests.tiny import next_logprobs, tiny_llama, tiny_tokenizer

TEXTS = [Example([1, 8, 9], [10, 11, 2]), Example([1, 9], [13, 2]), Example([1, 7, 9], [14, 15, 16, 7, 2])]


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("models")
    return [tiny_llama(root / str(seed), tiny_tokenizer(), seed=seed) for seed in range(2)]


def _models(directories: list[Path]) -> list[CompletionModel]:
    return [CompletionModel(load_model(str(directory))) for directory in directories]


def test_the_loss_is_the_sum_over_tokens_of_the_divergence_from_the_teacher(directories: list[Path]) -> None:
    """Σ_t Σ_v q_t(v) (log q_t(v) − log s_t(v)), place by place, the end token's place included."""
    student, teacher = _models(directories)
    found = distillation_loss(student, teacher, TEXTS, pad_id=0, device="cpu")
    terms = []
    for text in TEXTS:
        ids = [*text.prompt_ids, *text.response_ids]
        for end in range(len(text.prompt_ids), len(ids)):
            q, s = (next_logprobs(model.causal_lm, ids[:end]) for model in (teacher, student))
            terms.append(float((q.exp() * (q - s)).sum()))
    assert float(found.detach()) == pytest.approx(sum(terms), rel=1e-5)
    assert found.requires_grad
    assert float(distillation_loss(student, student, TEXTS, pad_id=0, device="cpu").detach()) == pytest.approx(
        0, abs=1e-6
    )


def test_the_divergence_s_gradient_is_the_difference_of_the_distributions() -> None:
    """∂ KL(q ‖ s) / ∂ logits of s = s − q"""
    generator = torch.Generator().manual_seed(0)
    q, s = (torch.randn(5, 7, generator=generator) for _ in range(2))
    [gradient] = torch.autograd.grad(token_kl(q, s.requires_grad_()).sum(), s)
    torch.testing.assert_close(gradient, s.softmax(-1) - q.softmax(-1))


def test_a_step_in_pieces_is_the_step_of_the_whole(directories: list[Path]) -> None:
    """Passes of one step give the gradient of their mean, and the weights move after the last of them alone."""
    gradients, moved = [], []
    for parts in ([TEXTS[:1], TEXTS[:1]], [TEXTS[:1]]):
        student, teacher = _models(directories)
        before = [p.detach().clone() for p in student.parameters()]
        engine = LocalEngine(student, learning_rate=1e-2, total_steps=4, accumulation=len(parts))
        for texts in parts:
            assert all(torch.equal(a, b) for a, b in zip(before, student.parameters(), strict=True))
            engine.backward(distillation_loss(student, teacher, texts, pad_id=0, device="cpu"))
            gradient = torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])
            engine.step()
        gradients.append(gradient)
        moved.append(torch.cat([p.detach().flatten() for p in student.parameters()]))
    torch.testing.assert_close(*gradients)
    torch.testing.assert_close(*moved)
    assert not torch.equal(moved[0], torch.cat([p.flatten() for p in before]))
