"""Rewards: a Python callable or a sequence classifier, both as a function of prompts and responses."""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from mpo_ray.policies.loading import load_reward_model

#: (prompts as text, responses) → one number each, higher is better.
Reward = Callable[[Sequence[str], Sequence[str]], list[float]]
IMPLICIT = "implicit"


class RewardError(ValueError):
    """A reward cannot be loaded, or does not return one finite number per response."""


def load_reward(spec: str, *, objective: str, batch_size: int = 32) -> Reward:
    """Load `module:function`, `file.py:function`, or a sequence classifier (directory or hub id).

    A classifier reads prompt and response as one text. The result checks what the reward returns. Raises RewardError.
    """
    where = f"objectives.{objective}.reward"
    if not is_callable_spec(spec):
        return _checked(_Classifier(spec, batch_size), where)
    module_name, _, function_name = spec.rpartition(":")
    try:
        module = _import_file(module_name) if module_name.endswith(".py") else importlib.import_module(module_name)
    except (ImportError, OSError) as error:
        raise RewardError(f"{where}: {module_name!r} cannot be imported: {error}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise RewardError(f"{where}: {module_name!r} has no function {function_name!r}.")
    return _checked(function, where)


def is_callable_spec(spec: str) -> bool:
    """Whether a reward names a Python function rather than a model."""
    module, colon, function = spec.rpartition(":")
    return bool(colon) and function.isidentifier() and not module.endswith("/") and "://" not in spec


def _import_file(path: str) -> Any:
    specification = importlib.util.spec_from_file_location(Path(path).stem, os.path.abspath(path))
    if specification is None or specification.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def _checked(reward: Callable[..., Any], where: str) -> Reward:
    def checked(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        values = [float(value) for value in reward(list(prompts), list(responses))]
        if len(values) != len(responses):
            raise RewardError(f"{where}: returned {len(values)} numbers for {len(responses)} responses.")
        for response, value in zip(responses, values, strict=True):
            if not math.isfinite(value):
                raise RewardError(f"{where}: returned {value} for the response {response[:80]!r}.")
        return values

    return checked


class _Classifier:
    """A sequence classifier with one logit."""

    def __init__(self, path: str, batch_size: int) -> None:
        self._model, self._tokenizer = load_reward_model(path)
        self._batch_size = batch_size
        if torch.cuda.is_available():
            self._model.to("cuda")

    @torch.no_grad()
    def __call__(self, prompts: list[str], responses: list[str]) -> list[float]:
        texts = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        values = [0.0] * len(texts)
        for start in range(0, len(order), self._batch_size):
            rows = order[start : start + self._batch_size]
            batch = self._tokenizer(
                [texts[i] for i in rows], return_tensors="pt", padding=True, truncation=True, padding_side="right"
            ).to(self._model.device)
            logits = self._model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            for i, value in zip(rows, logits[:, 0].float().tolist(), strict=True):
                values[i] = value
        return values
