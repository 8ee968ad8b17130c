"""A set of policies: every member gives the log-probabilities of the same model loaded alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpo_ray.policies.ensemble import Ensemble, by_length
from mpo_ray.policies.loading import load_policy
from mpo_ray.records import REFERENCE
from tests.tiny import next_logprobs, tiny_llama, tiny_lora, tiny_tokenizer

#: Three responses share a prompt, which is also the beginning of another prompt.
SEQUENCES = [
    ([1, 8, 9], [10, 11, 2]),
    ([1], [12, 2]),
    ([1, 9, 8, 7], [13, 14, 15, 7, 2]),
    ([1, 8, 9], [10, 2]),
    ([1, 8, 9, 10], [11, 2]),
    ([1, 8, 9], []),
    ([1, 12], [2]),
    ([1, 8, 9], [14, 15, 16, 17, 2]),
]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The reference, two adapters and a policy with full weights; one has a name that torch's containers use."""
    root: Path = tmp_path_factory.mktemp("policies")
    tokenizer = tiny_tokenizer()
    base = tiny_llama(root / "base", tokenizer, seed=0)
    return {
        REFERENCE: str(base),
        "helpful": str(tiny_lora(root / "helpful", base, seed=1)),
        "keys": str(tiny_lora(root / "keys", base, seed=2)),
        "whole": str(tiny_llama(root / "whole", tokenizer, seed=3)),
    }


@pytest.fixture(scope="module")
def policies(places: dict[str, str]) -> Ensemble:
    return Ensemble(places[REFERENCE], {k: v for k, v in places.items() if k != REFERENCE})


@pytest.fixture(scope="module")
def expected(places: dict[str, str]) -> dict[str, list[float]]:
    """Σ_t log π(y_t | x, y_<t), every policy loaded alone and every term by a pass of its own."""
    values = {}
    for name, path in places.items():
        alone = load_policy(path, places[REFERENCE])
        values[name] = [
            sum(float(next_logprobs(alone, [*p, *c][:t])[[*p, *c][t]]) for t in range(len(p), len(p) + len(c)))
            for p, c in SEQUENCES
        ]
    return values


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
@pytest.mark.parametrize(
    "names",
    [["keys"], [REFERENCE], ["whole"], ["keys", "whole", REFERENCE, "helpful"], ["helpful", "keys"]],
    ids="+".join,
)
def test_every_member_is_the_model_it_names(
    names: list[str], batch_size: int, policies: Ensemble, expected: dict[str, list[float]]
) -> None:
    """Alone and together, in batches of any size: log π_k(y | x) as by its definition."""
    found = policies.logprobs(names, SEQUENCES, batch_size=batch_size, pad_id=0)
    assert list(found) == names
    for name in names:
        assert found[name] == pytest.approx(expected[name], abs=1e-4)


def test_a_model_that_is_not_packed_gives_the_same(
    policies: Ensemble, expected: dict[str, list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where padding goes through the layers, prompts are not shared either."""
    monkeypatch.setattr("mpo_ray.policies.completion_model.enable_packing", lambda model: False)
    found = policies.logprobs([REFERENCE, "keys", "helpful"], SEQUENCES, batch_size=8, pad_id=0)
    for name, values in found.items():
        assert values == pytest.approx(expected[name], abs=1e-4)


def test_prompts_are_computed_once_and_padding_never(policies: Ensemble) -> None:
    """A pass over m responses to x has |x| − 1 + Σ (1 + |y_j|) tokens for each policy."""
    seen: list[int] = []
    prompt, responses = [1, 8, 9, 10], [[11, 2], [12, 13, 14, 2], [2]]
    with policies.model(REFERENCE) as model:
        hook = model.get_input_embeddings().register_forward_hook(lambda layer, inputs, out: seen.append(out.shape[1]))
    policies.logprobs(["keys", "helpful"], [(prompt, r) for r in responses], batch_size=100, pad_id=0)
    hook.remove()
    assert seen == [2 * (len(prompt) - 1 + sum(1 + len(response) for response in responses))]


def test_a_policy_is_one_model_while_its_block_runs(policies: Ensemble, expected: dict[str, list[float]]) -> None:
    prompt, completion = SEQUENCES[1]
    for name in ("keys", REFERENCE, "whole", "helpful"):
        with policies.model(name) as model:
            ids = [*prompt, *completion]
            found = sum(float(next_logprobs(model, ids[:t])[ids[t]]) for t in range(len(prompt), len(ids)))
        assert found == pytest.approx(expected[name][1], abs=1e-4)


def test_batches_by_length_go_from_short_to_long() -> None:
    lengths = [len(SEQUENCES[i][0]) + len(SEQUENCES[i][1]) for i in by_length(SEQUENCES)]
    assert lengths == sorted(lengths)
