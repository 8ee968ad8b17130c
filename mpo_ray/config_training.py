"""The parts of a run file that say how a model is trained: the reference, the policies, and MOPO's."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

Share = Annotated[float, Field(ge=0.0, le=1.0)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class Source(Strict):
    """Where rows come from: exactly one of `path`, `hub` and `embedded`."""

    path: str | list[str] | None = Field(
        None, description="files, globs or fsspec URLs (JSONL, JSON, CSV, Parquet; .gz)"
    )
    hub: str | None = Field(None, description="a Hugging Face data set id, or a local directory in the hub's layout")
    split: str = "train"
    config: str | None = Field(None, description="the name of one of the hub data set's configurations")
    data_dir: str | None = None
    revision: str | None = Field(None, description="branch, tag or commit of the hub data set")
    embedded: Literal["pairs", "corpus", "prompts"] | None = Field(None, description="made by the project itself")
    rename: dict[str, str] = Field({}, description="column in the file → column of the row form")

    @model_validator(mode="after")
    def _one_place(self) -> Source:
        given = [name for name in ("path", "hub", "embedded") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of path, hub, embedded; got {given or 'none'}")
        of_hub = [name for name in ("config", "data_dir", "revision") if getattr(self, name) is not None]
        if of_hub and self.hub is None:
            raise ValueError(f"{of_hub[0]} belongs to a hub data set, and the source has {given[0]}; remove it")
        return self


class Workers(Strict):
    """Ray Train workers of one training run."""

    num_workers: PositiveInt = 1
    cpus_per_worker: PositiveFloat = 1.0
    gpus_per_worker: Annotated[float, Field(ge=0.0)] = 0.0
    max_failures: Annotated[int, Field(ge=0)] = 2


class Training(Strict):
    """What SFT and preference training share. Sizes count texts (SFT) or pairs (DPO, IPO)."""

    epochs: PositiveInt = 1
    batch_size: PositiveInt = Field(32, description="per optimiser step, over all workers")
    micro_batch_size: PositiveInt = Field(8, description="per worker and forward pass")
    learning_rate: PositiveFloat = 5e-5
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    warmup_share: Share = 0.1
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    max_grad_norm: PositiveFloat = 1.0
    precision: Literal["fp32", "bf16"] = "fp32"
    zero_stage: Literal[0, 1, 2, 3] = 0
    gradient_checkpointing: bool = False
    checkpoint_every: PositiveInt = Field(200, description="optimiser steps")
    workers: Workers = Workers()

    @model_validator(mode="after")
    def _whole_accumulation(self) -> Training:
        forward = self.micro_batch_size * self.workers.num_workers
        if self.batch_size % forward:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of micro_batch_size × num_workers = {forward}"
            )
        return self

    @property
    def accumulation(self) -> int:
        """Forward passes of one worker per optimiser step."""
        return self.batch_size // (self.micro_batch_size * self.workers.num_workers)


class SupervisedTraining(Training):
    """SFT of the reference: rows with `text`, with `prompt` and `response`, or preference rows (their chosen side)."""

    source: Source
    learning_rate: PositiveFloat = 5e-4


class Lora(Strict):
    rank: PositiveInt = 16
    alpha: PositiveFloat = 32.0
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    target_modules: str | list[str] = "all-linear"


class PolicyTraining(Training):
    """DPO or IPO of one policy per objective (design 2.1)."""

    loss: Literal["dpo", "ipo"] = "dpo"
    beta: PositiveFloat = Field(0.5, description="KL strength β; small values move policies far and spoil the fit")
    length_normalized: bool = Field(False, description="mean instead of sum over the completion's tokens")
    model_dropout: bool = Field(False, description="train with the dropout that the model's own configuration asks for")
    lora: Lora | None = Field(Lora(), description="null trains all weights")


class ConstrainedTraining(Training):
    """MOPO (design 2.4): behaviour cloning weighted by ρ. Sizes count prompts, each with all its candidates."""

    method: Literal["offline", "online"] = Field(
        "offline", description="`offline` takes ρ of the solved pool, `online` updates λ, χ and the policy in one loop"
    )
    values_of: Literal["ratio", "policy"] = Field(
        "ratio",
        description="what λ answers, online: the values of ρ π_ref, as in the paper (`ratio`), or those of the policy "
        "itself on held-out prompts, so that what is trained meets the bounds (`policy`)",
    )
    batch_size: PositiveInt = Field(16, description="prompts per optimiser step, over all workers")
    micro_batch_size: PositiveInt = Field(4, description="prompts per worker and forward pass")
    model_dropout: bool = Field(False, description="train with the dropout that the model's own configuration asks for")
    lora: Lora | None = Field(Lora(), description="null trains all weights")
    multiplier_step: PositiveFloat = Field(0.5, description="η of λ in equation (10), per unit of win probability")
    chi_step: PositiveFloat = Field(0.05, description="step of log χ in equation (12)")
    lag: PositiveInt | None = Field(
        None, description="t0 of equation (13), optimiser steps; null keeps reference and bounds as they are (t0 = ∞)"
    )
    relaxation: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        0.99, description="of the bounds that are `adaptive`: b becomes this times what was reached t0 steps ago"
    )
    least_effective_share: Share = Field(
        0.1, description="of its candidates that ρ rests on, mean over the prompts; below it training stops"
    )

    @model_validator(mode="after")
    def _answers_in_a_loop(self) -> ConstrainedTraining:
        if self.values_of == "policy" and self.method != "online":
            raise ValueError(
                "values_of is policy, and the method is offline, which takes λ from the pool before there is a policy; "
                "set method to online, or values_of to ratio"
            )
        return self
