"""Seconds per token of this machine: some real rows of a run go through its model, for some seconds.

Sizes grow from one row to what a stage takes at a time, as long as there is time: small batches are slower per token.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from mpo_ray.cluster.trainable import load_trainable
from mpo_ray.config_training import PolicyTraining, SupervisedTraining, Training
from mpo_ray.data.limits import longest_text
from mpo_ray.decoding.sampler import MixtureSampler, Room, sampling_recipe
from mpo_ray.policies.completion_model import CompletionModel
from mpo_ray.policies.cpu import optimize_for_cpu
from mpo_ray.policies.ensemble import Sequences, sequence_logprobs
from mpo_ray.policies.loading import load_model
from mpo_ray.policies.mixture import mixture_of_one
from mpo_ray.records import REFERENCE
from mpo_ray.stages.estimate import Speeds
from mpo_ray.training.preference import Pair, preference_loss
from mpo_ray.training.sft import Example, sft_loss

#: Seconds for each kind of pass, about at most.
BOX_S = 8.0
#: How much larger the next batch is, and the tokens that each row is decoded for.
GROWTH, NEW_TOKENS = 4, 8


@dataclass(frozen=True, slots=True)
class Batch:
    """What was done. steps: of decoding; elsewhere: seconds of it that are counted elsewhere; seconds: all of them"""

    tokens: int
    steps: int = 1
    elsewhere: float = 0.0
    seconds: float = 0.0

    @property
    def own(self) -> float:
        """Its seconds without those that are counted elsewhere, of which no more than three quarters are left out."""
        return max(self.seconds - self.elsewhere, self.seconds / 4)


def timed(work: Callable[[int], Batch], most: int, *, box_s: float = BOX_S) -> list[Batch]:
    """Batches of 1, 4, 16, … rows up to `most`, as many as the time allows: at least one.

    work: does a batch of so many rows
    """
    started, size, found = time.perf_counter(), 1, list[Batch]()
    work(size)  # what happens once only is not counted
    while True:
        before = time.perf_counter()
        batch = work(size)
        found.append(replace(batch, seconds=time.perf_counter() - before))
        if size >= most or time.perf_counter() - started + GROWTH * found[-1].seconds > box_s:
            return found
        size = min(most, GROWTH * size)


def per_token(batches: Sequence[Batch]) -> float:
    """Seconds per token of the largest batch."""
    return batches[-1].own / batches[-1].tokens


def per_step(batches: Sequence[Batch]) -> tuple[float, float]:
    """(s, d) of a step that takes s + R × d seconds for R rows, by the smallest and the largest batch."""
    (few, first), (many, last) = ((b.tokens / b.steps, b.own / b.steps) for b in (batches[0], batches[-1]))
    each = max(0.0, (last - first) / (many - few)) if many > few else 0.0
    return max(0.0, first - few * each), each


def measure_speeds(
    model: str,
    policies: PolicyTraining,
    sft: SupervisedTraining | None,
    pairs: Sequence[Pair],
    *,
    ends: Sequence[int],
    pad_id: int,
    seed: int,
    scored_rows: int,
    decoded_rows: int,
    precision: str,
    cpus_per_actor: float,
) -> Speeds:
    """Time each kind of pass in this process, with as many threads as its worker or actor has.

    pairs: real ones, repeated where a batch has more; scored_rows, decoded_rows, precision: of the actors
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    steps: dict[bool, float] = {True: 0.0, False: 0.0}  # whether a LoRA is trained
    steps[policies.lora is not None] = _of_policies(model, policies, pairs, pad_id=pad_id, seed=seed, device=device)
    if sft is not None and policies.lora is not None:
        texts = [Example(pair.prompt_ids, pair.chosen_ids) for pair in pairs]
        steps[False] = _of_texts(model, sft, texts, pad_id=pad_id, seed=seed, device=device)
    with _threads(cpus_per_actor):
        read = load_model(model, precision=precision).to(device)
        sequences = [(pair.prompt_ids, pair.chosen_ids) for pair in pairs]
        forward = _of_forward(read, sequences, most=scored_rows, pad_id=pad_id)
        optimize_for_cpu(read)
        step, decode = _of_decoding(read, sequences, forward, most=decoded_rows, ends=ends)
    return Speeds(adapt=steps[True], train=steps[False], forward=forward, step=step, decode=decode)


def _of_policies(
    model: str, training: PolicyTraining, pairs: Sequence[Pair], *, pad_id: int, seed: int, device: str
) -> float:
    def loss(policy: CompletionModel, size: int) -> tuple[torch.Tensor, int]:
        chosen = _first(pairs, size)
        how: dict[str, Any] = {"pad_id": pad_id, "device": device, "length_normalized": training.length_normalized}
        found = preference_loss(policy, chosen, loss=training.loss, beta=training.beta, **how)
        tokens = sum(2 * len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) for p in chosen)
        return found.losses.sum(), tokens

    return _of_steps(model, training, loss, seed=seed, device=device)


def _of_texts(
    model: str, training: SupervisedTraining, texts: Sequence[Example], *, pad_id: int, seed: int, device: str
) -> float:
    def loss(policy: CompletionModel, size: int) -> tuple[torch.Tensor, int]:
        chosen = _first(texts, size)
        return sft_loss(policy, chosen, pad_id=pad_id, device=device)[0], sum(text.num_tokens for text in chosen)

    return _of_steps(model, training, loss, seed=seed, device=device)


def _of_steps(
    path: str,
    training: Training,
    loss_of: Callable[[CompletionModel, int], tuple[torch.Tensor, int]],
    *,
    seed: int,
    device: str,
) -> float:
    """Forward, backward and an optimiser step of each batch."""
    with _threads(training.workers.cpus_per_worker):
        policy = CompletionModel(load_trainable(path, training, seed=seed)).to(device).train()
        trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=0.0)

        def step(size: int) -> Batch:
            loss, tokens = loss_of(policy, size)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
            float(loss.detach())  # waits for a GPU
            return Batch(tokens)

        return per_token(timed(step, training.micro_batch_size))


def _of_forward(model: Any, sequences: Sequences, *, most: int, pad_id: int) -> float:
    def score(size: int) -> Batch:
        chosen = _first(sequences, size)
        sequence_logprobs(model, chosen, batch_size=most, pad_id=pad_id)
        return Batch(sum(len(prompt) + len(reply) for prompt, reply in chosen))

    return per_token(timed(score, most))


def _of_decoding(
    model: Any,
    sequences: Sequences,
    forward: float,
    *,
    most: int,
    ends: Sequence[int],
) -> tuple[float, float]:
    """Without the prompts' own forward pass, whose seconds per token are known."""
    sampler = MixtureSampler(mixture_of_one(REFERENCE, model), Room(most))
    context = longest_text(model.config)
    left = NEW_TOKENS if context is None else context - max(len(prompt) for prompt, _ in sequences)
    recipe = sampling_recipe({REFERENCE: 1.0}, max_new_tokens=min(NEW_TOKENS, left), temperature=1.0)

    def draw(size: int) -> Batch:
        prompts = [prompt for prompt, _ in _first(sequences, size)]
        drawn = sampler.draw(prompts, recipe, num=1, end_ids=ends, seed=0)
        lengths = [len(one.tokens) for row in drawn for one in row]
        return Batch(sum(lengths), steps=max(lengths), elsewhere=forward * sum(map(len, prompts)))

    return per_step(timed(draw, most))


def _first(rows: Sequence[Any], size: int) -> list[Any]:
    return [rows[place % len(rows)] for place in range(size)]


@contextmanager
def _threads(cpus: float) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, int(cpus)))
    try:
        yield
    finally:
        torch.set_num_threads(before)
