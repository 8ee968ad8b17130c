"""What the stages of a run will take: memory, time and disk, as plain arithmetic (design 7.5).

memory of a process = process + weights + adapters + optimiser state + activations and logits of its batch + cache
time = start of the processes + tokens × seconds per token, of the kind of pass that the stage makes
disk = what is kept + the checkpoints while training + tables

All of these are estimates. Nothing here looks at a file, a clock or the machine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
#: What a process holds before its models: Python, torch and Ray; for training DeepSpeed as well.
ACTOR_PROCESS, TRAINING_PROCESS = 600_000_000, 780_000_000
#: Seconds until the processes of a stage are at work, and until those of a training have also written their results.
ACTOR_START_S, TRAINING_START_S = 12.0, 35.0
#: Values of a layer that wait for the backward pass, per token: of the hidden size, and of the inner size of its MLP.
HIDDEN_KEPT, INNER_KEPT = 11, 4
#: What a backward pass holds at its peak, as a multiple of what waits for it: gradients, and memory not yet given back.
BACKWARD = 1.5
#: Seconds beside decoding and scoring: of the fit for bootstrap draws, the other fits and the predicted trade-off, of
#: the evaluation for opening soups and for its metrics.
FIT_S, EVALUATION_S = 5.0, 8.0
#: Forward passes that comparing two whole distributions at each place costs, for each model.
KL_PASSES = 2
#: Copies of the logits: with their gradient, alone, and beside the fp64 probabilities that a token is drawn from.
LOGITS_TRAINED, LOGITS_READ, LOGITS_DRAWN = 2, 1, 3
#: Checkpoints of one training: two are kept while the next is written.
CHECKPOINTS = 3
#: Bytes of a token in a table of token ids, and in one that holds the text as well.
ID_BYTES, TEXT_BYTES = 3, 8
#: AdamW's two averages of a gradient, fp32, and the fp32 copy of a weight that is sharded or kept in bf16.
MOMENTS, MASTER = 8, 4


@dataclass(frozen=True, slots=True)
class Shape:
    """A model's sizes. adapter: parameters of one policy's LoRA, 0 where all weights are trained.

    kv_width: key-value heads × their dimension; inner: hidden size of the MLP
    """

    parameters: int
    adapter: int
    layers: int
    hidden: int
    inner: int
    kv_width: int
    vocabulary: int


@dataclass(frozen=True, slots=True)
class Speeds:
    """Seconds in one process.

    adapt, train: per token of a step that trains an adapter, and all weights; 0 for a kind that the run has no use for
    forward: per token of a forward pass
    step, decode: a step that decodes one token of each of R rows takes step + R × decode
    """

    adapt: float
    train: float
    forward: float
    step: float
    decode: float


@dataclass(frozen=True, slots=True)
class Need:
    """What one stage will take. seconds: None where nothing was timed; memory: of one process, bytes by part.

    processes: how many work at a time; disk: bytes, the checkpoints of a training included
    settings: part of the memory, or `processes` → the setting that lowers it
    on_gpu: whether each has a GPU of its own, which holds all but the process itself
    """

    stage: str
    seconds: float | None
    memory: Mapping[str, int]
    processes: int
    disk: int
    settings: Mapping[str, str]
    on_gpu: bool = False

    @property
    def bytes_each(self) -> int:
        return sum(self.memory.values())

    def remedy(self, free: int, *, num_nodes: int = 1) -> str | None:
        """What lowers the memory of a stage that needs more than `free` bytes on each node; None where it fits.

        Of a stage on GPUs, `free` is that of one GPU.
        """
        if self.on_gpu:
            return None if self.bytes_each - self.memory["process"] <= free else self._of_largest_part()
        if self.bytes_each * math.ceil(self.processes / num_nodes) <= free:
            return None
        if self.bytes_each <= free and "processes" in self.settings:
            return self.settings["processes"]
        return self._of_largest_part()

    def _of_largest_part(self) -> str:
        return self.settings[max(self.settings, key=lambda part: self.memory.get(part, 0))]


def training_state(total: int, trained: int, *, precision: str, zero_stage: int, num_workers: int) -> dict[str, int]:
    """Bytes of weights, gradients and optimiser of one worker. ZeRO 1 shards the optimiser, 2 gradients, 3 weights."""
    width = BYTES[precision]
    master = MASTER if precision == "bf16" or zero_stage else 0
    shards = [num_workers if zero_stage >= stage else 1 for stage in (1, 2, 3)]
    return {
        "weights": total * width // shards[2],
        "optimiser": trained * width // shards[1] + trained * (MOMENTS + master) // shards[0],
    }


def kept_activations(shape: Shape, tokens: int, *, precision: str, checkpointing: bool) -> int:
    """Bytes that a batch of so many tokens keeps for its backward pass, without the logits.

    With gradient checkpointing each layer keeps its input, and one layer at a time is computed again.
    """
    layer = HIDDEN_KEPT * shape.hidden + INNER_KEPT * shape.inner
    values = shape.layers * shape.hidden + layer if checkpointing else shape.layers * layer
    return tokens * values * BYTES[precision]


def passing_activations(shape: Shape, tokens: int, *, precision: str) -> int:
    """Bytes of a forward pass that keeps nothing: those of one layer."""
    return tokens * (HIDDEN_KEPT * shape.hidden + INNER_KEPT * shape.inner) * BYTES[precision]


def cache(shape: Shape, rows: int, length: int, *, precision: str) -> int:
    """Bytes of the keys and values of `rows` sequences of `length` tokens."""
    return rows * length * 2 * shape.layers * shape.kv_width * BYTES[precision]


def logits(shape: Shape, tokens: int, *, copies: int) -> int:
    """Bytes of the logits that predict so many tokens, fp32."""
    return tokens * shape.vocabulary * 4 * copies


def checkpoint(trained: int, *, precision: str, zero_stage: int) -> int:
    """Bytes of one checkpoint of a training on disk, of all its workers together."""
    master = MASTER if precision == "bf16" or zero_stage else 0
    return trained * (BYTES[precision] + MOMENTS + master)


def rounds(jobs: int, at_a_time: int) -> int:
    """How many times processes start, one after the other."""
    return math.ceil(jobs / max(1, at_a_time))


def training_seconds(
    jobs: int,
    at_a_time: int,
    *,
    train_tokens: float,
    heldout_tokens: float,
    num_workers: int,
    step: float,
    forward: float,
) -> float:
    """Time of `jobs` trainings alike, by workers that start once.

    train_tokens: of all steps of one; heldout_tokens: of all its evaluations; step, forward: seconds per token
    """
    work = train_tokens * step + heldout_tokens * forward
    return TRAINING_START_S + rounds(jobs, at_a_time) * work / num_workers


def actor_seconds(
    *, forward_tokens: float, decoded_tokens: float, decoded_steps: int, num_actors: int, speeds: Speeds
) -> float:
    """Time of a stage of actors. Tokens count once for each row: K times where K policies read or write them.

    decoded_steps: of all batches, each as many as its longest answer has tokens
    """
    work = forward_tokens * speeds.forward + decoded_tokens * speeds.decode + decoded_steps * speeds.step
    return ACTOR_START_S + work / num_actors
