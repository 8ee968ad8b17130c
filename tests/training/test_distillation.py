"""Distillation's loss and the engine of one process, on a real model, against separately computed figures."""

from pathlib import Path

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from mpo_ray.maths.sequence_logprob import token_kl
from mpo_ray.policies.completion_model import CompletionModel
from mpo_ray.policies.loading import load_model
from mpo_ray.stages.distilling import Schooling, _train
from mpo_ray.training import local_engine
from mpo_ray.training.distillation import distillation_loss
from mpo_ray.training.local_engine import LocalEngine
from mpo_ray.training.loop import NonFiniteError
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


def test_the_gradient_does_not_depend_on_the_size_of_a_forward_pass(
    directories: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """∇ Σ KL / Σ tokens over the step, for forward passes of 1, 2, 4 and 8 completions of 2 to 20 tokens."""
    monkeypatch.setattr(local_engine, "MAX_GRADIENT_NORM", 1e9)
    lengths = [2, 3, 2, 20, 4, 15, 2, 9]
    lessons = [Example([1, 7 + n], [*(7 + (3 * i + n) % 16 for i in range(m - 1)), 2]) for n, m in enumerate(lengths)]
    seen: list[torch.Tensor] = []
    losses = []
    for size in (1, 2, 4, 8):
        student, teacher = _models(directories)

        def watch(optimizer: torch.optim.Optimizer, *_: object) -> None:
            seen.append(torch.cat([p.grad.flatten() for g in optimizer.param_groups for p in g["params"]]))

        handle = register_optimizer_step_pre_hook(watch)
        try:
            [step] = _train(
                teacher,  # type: ignore[arg-type]  # a mixture is one more teacher
                student.causal_lm,
                lessons,
                Schooling(steps=1, batch_size=8, micro_batch_size=size),
                pad_id=0,
                seed=0,
                show=lambda *_: None,
            )
        finally:
            handle.remove()
        losses.append(step["loss"])
    student, teacher = _models(directories)
    whole = distillation_loss(student, teacher, lessons, pad_id=0, device="cpu") / sum(lengths)
    whole.backward()
    gradient = torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])
    assert losses == pytest.approx([float(whole.detach())] * 4, rel=1e-5)
    for found in seen:
        torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))


def test_distillation_stops_at_a_loss_that_is_not_finite(directories: list[Path]) -> None:
    student, teacher = _models(directories)
    with torch.no_grad():
        next(iter(teacher.parameters()))[14] = torch.nan
    lessons = [Example([1, 8], [9, 2]), Example([1, 8], [14, 10, 2])]
    how = Schooling(steps=1, batch_size=2, micro_batch_size=1)
    with pytest.raises(NonFiniteError, match="step 1: the loss is not finite in the forward pass of completion 2 of 2"):
        _train(teacher, student.causal_lm, lessons, how, pad_id=0, seed=0, show=lambda *_: None)  # type: ignore[arg-type]
