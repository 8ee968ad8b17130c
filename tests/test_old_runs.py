"""Run directories and artefacts of version 0.1 are read: these are as its last commit wrote them."""

from __future__ import annotations

from pathlib import Path

from mpo_ray.cli import _artefact
from mpo_ray.decoding.open_engine import open_engine
from mpo_ray.decoding.protocol import GenerationRequest, Sampling
from mpo_ray.policies.artefact import check_artefact
from mpo_ray.policies.mixture_config import MixtureConfig
from tests.world_runner import drain

RUN = Path(__file__).parent / "old_runs/version_0_1"
#: What that version decoded greedily from its artefact.
PROMPT, TOKENS = (1, 8, 9, 10), [3, 13, 3, 16, 4, 19, 24, 4, 3, 20, 22, 23]


def test_a_run_directory_says_how_its_mixture_is_served() -> None:
    artefact, name, serve = _artefact(str(RUN))
    assert (Path(artefact), name) == (RUN / "mixture", "old")
    assert serve.max_num_seqs == 12, "`num_lanes` was its name"
    assert (serve.precision, serve.kv_cache_gib) == ("auto", None)


def test_an_artefact_is_whole_and_gives_the_same_tokens() -> None:
    check_artefact(RUN / "mixture", MixtureConfig.from_pretrained(RUN / "mixture"))
    engine = open_engine(str(RUN / "mixture"), max_num_seqs=2)
    engine.submit(GenerationRequest("0", PROMPT, Sampling(len(TOKENS), temperature=0.0)))
    assert [token for delta in drain(engine)["0"] for token in delta.tokens] == TOKENS
