"""Two sets of weights behind one forward: what the lagged one says, and what it costs."""

import pytest
import torch

from mpo_ray.cluster.trainable import KeptBase
from mpo_ray.config_training import ConstrainedTraining
from mpo_ray.policies.completion_model import CompletionModel
from mpo_ray.training.constrained import token_batch
from mpo_ray.training.lagged import LaggedModel
from tests.tiny import tiny_llama, tiny_tokenizer
from tests.training.candidates import candidates

BATCH = token_batch(candidates(3, seed=0), pad_id=0)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_llama(tmp_path_factory.mktemp("base"), tiny_tokenizer(), seed=0))


def _model(base: str, **changes: object) -> CompletionModel:
    values = {"method": "online", "lag": 3, "lora": {"rank": 4, "dropout": 0.5}}
    return KeptBase().completion_model(base, ConstrainedTraining.model_validate({**values, **changes}), seed=0)


@pytest.mark.parametrize("lora", [{"rank": 4, "dropout": 0.5}, None])
def test_lagged_weights_stay_what_they_were_while_the_others_are_trained(base: str, lora: dict | None) -> None:
    model = _model(base, lora=lora)
    assert isinstance(model, LaggedModel)
    reference = model.eval()(BATCH).detach()
    assert torch.allclose(reference, model(BATCH, weights="lagged"), atol=1e-5)  # both begin as the model given
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, _, parameter in model.lagged_pairs():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    other = model(BATCH, weights="lagged")
    assert (other - reference).abs().max() > 0.1
    model.train()
    wanted = [p.requires_grad for p in model.parameters()]
    for _ in range(2):
        model(BATCH).sum().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad and parameter.grad is not None:
                    parameter.sub_(0.01 * parameter.grad.clamp(-1, 1))
        lagged = model(BATCH, weights="lagged")
        assert not lagged.requires_grad
        assert torch.allclose(lagged, other, atol=1e-5)  # nor is there dropout
        assert (model(BATCH) - reference).abs().max() > 0.1
    assert [p.requires_grad for p in model.parameters()] == wanted
    assert all(m.training for m in model.modules())


def test_a_lagged_adapter_costs_an_adapter_and_no_model(base: str) -> None:
    plain, lagged = _model(base, lag=None), _model(base)
    assert not isinstance(plain, LaggedModel)
    counts = [sum(p.numel() for p in m.parameters()) for m in (plain, lagged)]
    trained = [sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (plain, lagged)]
    assert counts[1] - counts[0] == trained[0] == trained[1]


def test_every_trained_parameter_has_the_lagged_one_of_its_name(base: str) -> None:
    for lora in ({"rank": 4}, None):
        model = _model(base, lora=lora)
        assert isinstance(model, LaggedModel)
        pairs = model.lagged_pairs()
        names = {id(p): name for name, p in model.named_parameters()}
        assert {id(trained) for _, trained, _ in pairs} == {id(p) for p in model.parameters() if p.requires_grad}
        for _, trained, lagged in pairs:
            assert not lagged.requires_grad
            expected = names[id(trained)].replace(".default.", ".lagged.")
            assert names[id(lagged)] == (expected if lora else f"lagged.{names[id(trained)]}")
