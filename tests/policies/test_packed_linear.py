"""Packed layers: one product for those that are given one input, and the same numbers for any number of rows."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from mpo_ray.policies import packed_linear
from mpo_ray.policies.packed_linear import PackedLinear, pack_linears
from tests.tiny import TINY_SIZES


@pytest.mark.parametrize("rows", [1, 2, 7, packed_linear.MKL_ROWS, packed_linear.MKL_ROWS + 3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("intel", [True, False], ids=["MKL", "oneDNN"])
def test_a_packed_layer_is_the_layer(rows: int, bias: bool, intel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if intel and not packed_linear._has_mkl():
        pytest.skip("this build of torch has no MKL")
    monkeypatch.setattr(packed_linear, "_is_intel", lambda: intel)
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(24, 40, bias=bias)
    inputs = torch.randn(1, rows, 24, generator=generator)
    packed = PackedLinear(layer)
    assert packed._by_mkl == intel
    with torch.no_grad():
        torch.testing.assert_close(packed(inputs), layer(inputs), atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN packs no bfloat16 here")
@pytest.mark.parametrize("rows", [1, 7])
def test_a_packed_layer_is_the_layer_in_bfloat16(rows: int) -> None:
    layer = nn.Linear(24, 40, dtype=torch.bfloat16)
    inputs = torch.randn(1, rows, 24, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    with torch.no_grad():
        torch.testing.assert_close(PackedLinear(layer)(inputs), layer(inputs))


@pytest.mark.parametrize(("supported", "seconds"), [(True, 0.5), (True, 1.0), (False, 0.5)])
def test_bfloat16_is_packed_where_it_can_be_and_takes_less_time(
    supported: bool, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    monkeypatch.setattr(packed_linear, "_has_onednn", lambda: True)
    monkeypatch.setattr(packed_linear, "PackedLinear", lambda plain: plain)
    monkeypatch.setattr(packed_linear, "shortest_seconds", lambda ways: {"plain": 1.0, "packed": seconds})
    assert packed_linear._packs_bfloat16.__wrapped__() == (supported and seconds < 1.0)


def test_layers_with_one_input_are_one_product() -> None:
    """q, k, v (with biases) and gate, up: two products less and one less in every layer, and the same logits."""
    model = Qwen2ForCausalLM(Qwen2Config(**{**TINY_SIZES, "vocab_size": 40})).eval()
    ids = torch.tensor([[1, 8, 9, 10], [1, 12, 5, 6]])
    with torch.no_grad():
        for name, bias in model.named_parameters():
            if name.endswith("proj.bias"):
                bias.normal_()
        expected = model(ids).logits
        plain = sum(isinstance(module, nn.Linear) for module in model.modules())
        pack_linears(model)
        packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
        assert len(packed) == plain - 3 * model.config.num_hidden_layers
        for _ in range(2):
            torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=1e-5)
