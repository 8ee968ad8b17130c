"""RMS norms in fewer calls: what they give is what the model's own give, or they are left alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from mpo_ray.policies.short_norm import ShortNorm, shorten_norms


def in_a_model(norm: nn.Module) -> nn.ModuleDict:
    with torch.no_grad():
        norm.weight.copy_(torch.randn(16, generator=torch.Generator().manual_seed(1)))
    return nn.ModuleDict({"norm": norm})


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Qwen3RMSNorm, Gemma3RMSNorm])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3])
def test_a_short_norm_gives_what_the_models_own_gives(kind: type[nn.Module], scale: float) -> None:
    """w x / √(mean x² + ε), with 1 + w for Gemma's, where ε counts and where it does not."""
    model = in_a_model(kind(16))
    inputs = scale * torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(2))
    expected = model["norm"](inputs)
    shorten_norms(model)
    assert isinstance(model["norm"], ShortNorm)
    torch.testing.assert_close(model["norm"](inputs), expected, rtol=1e-5, atol=1e-6)


def test_a_norm_that_gives_something_else_stays() -> None:
    class CentredRMSNorm(LlamaRMSNorm):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return super().forward(hidden_states - hidden_states.mean(-1, keepdim=True))

    model = in_a_model(CentredRMSNorm(16))
    shorten_norms(model)
    assert isinstance(model["norm"], CentredRMSNorm)
