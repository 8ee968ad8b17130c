"""A set of policies: every member gives the log-probabilities of the same model loaded alone."""

from pathlib import Path

import pytest

from mpo_ray.policies.loading import load_policy
from mpo_ray.policies.policy_set import PolicySet
from mpo_ray.records import REFERENCE
from tests.tiny import next_logprobs, tiny_llama, tiny_lora, tiny_tokenizer

SEQUENCES = [([1, 8, 9], [10, 11, 2]), ([1], [12, 2]), ([1, 9, 8, 7], [13, 14, 15, 7, 2]), ([1, 12], [2])]


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


def test_every_member_is_the_model_it_names(places: dict[str, str]) -> None:
    policies = PolicySet(places[REFERENCE], {k: v for k, v in places.items() if k != REFERENCE})
    for name in ("keys", REFERENCE, "helpful", "whole", REFERENCE, "keys"):
        alone = load_policy(places[name], places[REFERENCE])
        expected = [
            sum(float(next_logprobs(alone, [*p, *c][:t])[[*p, *c][t]]) for t in range(len(p), len(p) + len(c)))
            for p, c in SEQUENCES
        ]
        assert policies.logprobs([name], SEQUENCES, batch_size=3, pad_id=0)[name] == pytest.approx(expected, abs=1e-4)
