"""Adapters as users have them, of tiny models, and what a mixture of them is compared with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    LlamaForCausalLM,
)

from mpo_ray.decoding.branch import Piece
from mpo_ray.decoding.need import Need
from mpo_ray.decoding.runner import MixtureRunner
from mpo_ray.policies.artefact import write_artefact
from mpo_ray.policies.mixture import MixtureForCausalLM
from tests.tiny import TINY_SIZES

IDS = [1, 8, 9, 10, 11, 7, 6]
MOE = {**TINY_SIZES, "vocab_size": 25}
WEIGHTS = {"odd": 0.6, "plain": 0.4}


def adapted(base: Path, **config: Any) -> PeftModel:
    """A LoRA of the model at `base` all whose trained parameters are random."""
    made = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], **config}
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", **made))
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def adapter(directory: Path, base: Path, **config: Any) -> Path:
    """As `PeftModel.save_pretrained` writes it: no tokenizer beside it."""
    adapted(base, **config).save_pretrained(directory)
    return directory


def change(directory: Path, **values: Any) -> Path:
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return directory


def rewrite(file: Path, by: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    save_file({k: v.contiguous() for k, v in by(load_file(file)).items()}, file, metadata={"format": "pt"})


def mix(out: Path, policies: dict[str, str | Path], reference: Path) -> list[str]:
    """Write the artefact as `mpo-ray mix` does; returns the lines that it tells."""
    told: list[str] = []
    weights = dict.fromkeys(policies, 1 / len(policies)) if policies.keys() != WEIGHTS.keys() else WEIGHTS
    how: dict[str, Any] = {"copy_reference": False, "weights": weights, "fit": {}, "tell": told.append}
    write_artefact(out, objectives=policies, reference=reference, **how)
    return told


@torch.no_grad()
def logprobs(model: Any) -> Tensor:
    return model(input_ids=torch.tensor([IDS])).logits[0].double().log_softmax(-1)  # type: ignore[no-any-return]


def as_peft(base: Path, adapter: str | Path, **how: Any) -> Tensor:
    return logprobs(PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), str(adapter), **how).eval())


def by_engine(mixture: MixtureForCausalLM) -> Tensor:
    runner = MixtureRunner(mixture, max_num_seqs=1)
    [lane], _ = runner.open(Need((0, 1), (), 64))
    parts = [(0, 4), (4, 5), (5, 7)]
    weights = list(mixture.config.weights.values())
    rows = [
        runner.run([Piece(lane, IDS[a:b], a, weights, b - a, True)]).logits.double().log_softmax(-1) for a, b in parts
    ]
    return torch.cat(rows)


def assert_mixture(artefact: Path, odd: Tensor, plain: Tensor) -> None:
    """The artefact's next-token distributions are the product of the two, by `forward` and by the engine."""
    expected = (WEIGHTS["odd"] * odd + WEIGHTS["plain"] * plain).log_softmax(-1)
    mixture = MixtureForCausalLM.from_pretrained(artefact)
    torch.testing.assert_close(logprobs(mixture), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(by_engine(mixture), expected, atol=1e-5, rtol=0)


def spoil(value: float, file: str = "adapter_model.safetensors", key: str = "layers.1.self_attn.v_proj") -> Any:
    def damage(odd: Path) -> None:
        def change(state: dict[str, Tensor]) -> dict[str, Tensor]:
            next(tensor for name, tensor in state.items() if key in name)[0, 0] = value
            return state

        rewrite(odd / file, change)

    return damage
