"""A training engine on DeepSpeed: ZeRO 0 to 3, fp32 or bf16, over the process group that Ray Train has set up."""

from __future__ import annotations

import json
import logging
import math
import tempfile
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from transformers import get_scheduler
from transformers.integrations import HfDeepSpeedConfig

from mpo_ray.cluster.checkpoints import TAG, CheckpointError
from mpo_ray.config_training import Training
from mpo_ray.policies.completion_model import CompletionModel
from mpo_ray.run import file_digest


def deepspeed_config(training: Training, *, world_size: int) -> dict[str, Any]:
    """The DeepSpeed configuration of a run: every size a number, since only the HF Trainer fills in "auto"."""
    return {
        "train_batch_size": training.batch_size,
        "train_micro_batch_size_per_gpu": training.micro_batch_size,
        "gradient_accumulation_steps": training.batch_size // (training.micro_batch_size * world_size),
        "gradient_clipping": training.max_grad_norm,
        "steps_per_print": 10**9,
        "bf16": {"enabled": training.precision == "bf16"},
        "zero_optimization": {"stage": training.zero_stage},
        "zero_allow_untested_optimizer": True,
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": training.learning_rate, "weight_decay": training.weight_decay, "torch_adam": True},
        },
    }


def prepare_sharded_loading(training: Training, *, world_size: int) -> HfDeepSpeedConfig | None:
    """For ZeRO 3: make `from_pretrained` load straight into shards. Keep the result alive until the engine exists."""
    if training.zero_stage != 3:
        return None
    _join_process_group()  # else DeepSpeed takes each worker for the only one
    return HfDeepSpeedConfig(deepspeed_config(training, world_size=world_size))


def _join_process_group() -> None:
    """Have DeepSpeed use the process group that is there.

    On CPU, DeepSpeed compiles a shared-memory all-reduce at first use. Gloo serves, across nodes too, and needs no
    compiler.
    """
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_init_required=False, verbose=False)


class DeepSpeedEngine:
    """The `training.engine.Engine` of one Ray Train worker."""

    def __init__(self, model: CompletionModel, training: Training, *, total_steps: int, device: torch.device) -> None:
        import deepspeed

        _join_process_group()
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self.device = device

        def schedule(optimizer: torch.optim.Optimizer) -> Any:
            warmup = round(training.warmup_share * total_steps)
            name = "constant_with_warmup" if training.schedule == "constant" else training.schedule
            return get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total_steps)

        self._engine, *_ = deepspeed.initialize(
            model=model,
            model_parameters=[p for p in model.parameters() if p.requires_grad],
            config=deepspeed_config(training, world_size=self.world_size),
            lr_scheduler=schedule,
            dist_init_required=False,
        )
        # Without ZeRO, in fp32, DeepSpeed clips by this method and keeps no norm.
        self._clipped_norm: torch.Tensor | None = None
        self._engine.clip_fp32_gradients = self._clip

    @property
    def model(self) -> CompletionModel:
        return cast(CompletionModel, self._engine)

    def backward(self, loss: torch.Tensor) -> None:
        self._engine.backward(loss)

    def step(self) -> None:
        self._engine.step()

    def gradient_norm(self) -> float:
        """Of the last step. DeepSpeed leaves a step out whose norm is not finite, and says nothing."""
        norm = self._engine.get_global_grad_norm() if self._clipped_norm is None else self._clipped_norm
        return math.nan if norm is None or float(norm) < 0 else float(norm)

    def _clip(self) -> None:
        from deepspeed.runtime.utils import clip_grad_norm_

        engine = self._engine
        self._clipped_norm = clip_grad_norm_(engine.module.parameters(), engine.gradient_clipping())

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Average of `values` over the workers."""
        total = values.detach().clone().to(self.device)
        dist.all_reduce(total)
        return total / self.world_size

    def save(self, directory: Path, *, step: int) -> None:
        """Write this worker's part of the state: weights, optimiser, schedule and the step reached.

        What lies in `directory / TAG` already is part of the state, and has its digest kept.
        """
        self._engine.save_checkpoint(
            str(directory), tag=TAG, client_state={"step": step}, save_latest=False, exclude_frozen_parameters=True
        )
        written = sorted(path for path in (directory / TAG).iterdir() if path.is_file())
        digests = {path.name: file_digest(str(path)) for path in written}
        (directory / f"digests-{self.rank}.json").write_text(json.dumps(digests))

    def load(self, directory: Path) -> int:
        """Restore what `save` wrote, which `read_checkpoint` has found whole, and return its step."""
        # DeepSpeed looks for files by a glob pattern: it gets a path in which no character is a part of one.
        with tempfile.TemporaryDirectory() as scratch:
            plain = Path(scratch) / "checkpoint"
            plain.symlink_to(directory.absolute())
            path, state = self._engine.load_checkpoint(str(plain), tag=TAG, load_module_strict=False)
        if path is None:
            raise CheckpointError(f"{directory}: DeepSpeed found no checkpoint {TAG!r} there.")
        return int(state["step"])

    def close(self) -> None:
        """Let go of the model and of the optimiser's state. The engine is of no use afterwards."""
        self._engine.destroy()
        self._engine.optimizer = self._engine.lr_scheduler = None
        del self._engine
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @property
    def wrapped(self) -> CompletionModel:
        """What was handed over."""
        return cast(CompletionModel, self._engine.module)

    @property
    def unwrapped(self) -> Any:
        """The causal LM itself."""
        return self.wrapped.causal_lm

    def gathered(self, parameter: torch.nn.Parameter, *, modifier: int | None = None) -> Any:
        """A context in which every worker has the whole parameter; what worker `modifier` changes there holds for all.

        Only a sharded parameter is gathered and sent; others are there already. Collective.
        """
        import deepspeed

        return deepspeed.zero.GatheredParameters(
            [parameter], modifier_rank=modifier, enabled=hasattr(parameter, "ds_id")
        )

    def full_state(self, *, trained_only: bool) -> dict[str, torch.Tensor]:
        """Weights by name, gathered one at a time on rank 0 (elsewhere empty). Collective."""
        state: dict[str, torch.Tensor] = {}
        for name, parameter in self.unwrapped.named_parameters():
            if trained_only and not parameter.requires_grad:
                continue
            with self.gathered(parameter):
                if self.rank == 0:
                    state[name] = parameter.detach().cpu().clone()
        return state
