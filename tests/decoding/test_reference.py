"""The base of the adapters is one policy more: decoded by itself, beside the mixture and in its step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mpo_ray.decoding.protocol import RequestError
from mpo_ray.policies.artefact import reference_path
from mpo_ray.policies.loading import load_model
from mpo_ray.policies.mixture_config import MixtureConfig
from tests.decoding.mixtures import PROMPTS, completed, engine_of, request, tokens

REFERENCE = {"reference": 1.0}


@pytest.mark.parametrize("kind", ["lora", "mixed"])
@pytest.mark.parametrize("prompt_tokens", [128, 3])
def test_the_reference_is_the_base_without_an_adapter(
    kind: str, prompt_tokens: int, artefacts: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    """log π_ref of every drawn token to 1e-5, Σ log Z_t = 0, alone and among the mixture's and the policies' rows."""
    model: Any = load_model(reference_path(artefacts[kind], MixtureConfig.from_pretrained(artefacts[kind])))
    fields = {"temperature": 1.0, "seed": 3, "num_logprobs": 0, "policy_logprobs": True}
    wanted = [request(n, prompt, weights=REFERENCE, **fields) for n, prompt in enumerate(PROMPTS)]
    others = [request(10 + n, prompt, **fields) for n, prompt in enumerate(PROMPTS)]
    engine = engine_of(artefacts[kind], prompt_tokens=prompt_tokens)
    alone, crowd = completed(engine, wanted), completed(engine, [*others[:2], *wanted, *others[2:]])
    for prompt, deltas, again in zip(PROMPTS, alone, crowd[2:6], strict=True):
        assert tokens(deltas) == tokens(again)
        ids = [*prompt, *tokens(deltas)]
        with torch.no_grad():
            logprobs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        found = [one for delta in deltas for one in delta.logprobs]
        for place, one in enumerate(found, start=len(prompt) - 1):
            expected = pytest.approx(float(logprobs[place, one.token]), abs=1e-5)
            assert one.logprob == expected
            assert one.by_policy == {"reference": expected}
        diagnostics = deltas[-1].diagnostics
        assert diagnostics is not None
        assert diagnostics.log_z == pytest.approx(0.0, abs=1e-5)
        assert {name: weight for name, weight in diagnostics.weights.items() if weight} == REFERENCE
    for mixed in crowd[:2]:
        assert mixed[-1].diagnostics is not None
        assert "reference" not in mixed[-1].diagnostics.weights
    assert engine.statistics().kv_blocks_used == 0
    assert caplog.records == []  # no pass failed and was made again request by request


def test_a_mixture_of_whole_models_has_no_reference(artefacts: dict[str, Path]) -> None:
    with pytest.raises(RequestError, match="no objective 'reference'"):
        engine_of(artefacts["full"]).submit(request(0, PROMPTS[0], weights=REFERENCE))
