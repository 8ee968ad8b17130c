"""Models whose cache cannot lie in blocks are decoded one sequence after the other, with their own distributions."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    PreTrainedModel,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
)

from mpo_ray.decoding.branch import Piece
from mpo_ray.decoding.engine import MixtureEngine
from mpo_ray.decoding.need import Need
from mpo_ray.decoding.open_engine import runner_of
from mpo_ray.decoding.protocol import Mode
from mpo_ray.decoding.runner import MixtureRunner
from mpo_ray.decoding.sequence_runner import SequenceRunner
from mpo_ray.policies.mixture import MixtureForCausalLM
from mpo_ray.policies.mixture_config import MixtureConfig
from mpo_ray.policies.own_cache import keeps_its_cache
from tests.decoding.mixtures import EOS, KINDS, PROMPTS, completed, request, tokens
from tests.tiny import TINY_SIZES

SIZES: dict[str, Any] = {**TINY_SIZES, "vocab_size": 40}
HYBRID = ["conv", "full_attention"]
#: With whether the model's own cache can be kept for several sequences.
MODELS: dict[str, tuple[Callable[[], PreTrainedModel], bool]] = {
    "convolutions": (lambda: Lfm2ForCausalLM(Lfm2Config(**SIZES, layer_types=HYBRID)), True),
    "a recurrent state": (
        lambda: Mamba2ForCausalLM(Mamba2Config(**{**SIZES, "num_heads": 8}, state_size=8, n_groups=2)),
        True,
    ),
    "a state in the module": (
        lambda: RecurrentGemmaForCausalLM(RecurrentGemmaConfig(**{**SIZES, "num_hidden_layers": 3}, lru_width=32)),
        False,
    ),
    "a window in the mask alone": (
        lambda: PhimoeForCausalLM(PhimoeConfig(**SIZES, num_local_experts=2, sliding_window=16)),
        True,
    ),
    "positions by biases": (
        lambda: FalconForCausalLM(
            FalconConfig(**{k: v for k, v in SIZES.items() if k != "head_dim"}, alibi=True, multi_query=False)
        ),
        True,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "mode", [Mode(), Mode("smc", particles=4), Mode("rejection", particles=2)], ids=lambda mode: mode.kind
)
def test_both_runners_draw_the_same(kind: str, mode: Mode, artefacts: dict[str, Path]) -> None:
    """Requests of different lengths and λ, prompts in pieces: the tokens of one seed, and Σ log Z to 1e-4."""
    answers = []
    for make in (MixtureRunner, SequenceRunner):
        mixture = MixtureForCausalLM.from_pretrained(artefacts[kind])
        runner: Any = make(mixture, max_num_seqs=8)
        engine = MixtureEngine(
            runner,
            {name: mixture.config.weights[name] for name in mixture.objectives},
            eos_ids=[EOS],
            tokenizer=None,
            prompt_tokens=3,
        )
        requests = [
            request(n, prompt, mode=mode, temperature=1.0, seed=n, weights=weights, max_tokens=4)
            for n, (prompt, weights) in enumerate(
                zip(PROMPTS, [None, {"positive": 1.0}, {"concise": 0.5, "detailed": 0.5}, None], strict=True)
            )
        ]
        answers.append(completed(engine, requests))
        assert runner.kv_blocks_used() == 0
    for one, other in zip(*answers, strict=True):
        assert tokens(one) == tokens(other)
        first, second = (deltas[-1].diagnostics for deltas in (one, other))
        assert first is not None
        assert second is not None
        assert first.log_z == pytest.approx(second.log_z, abs=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_a_family_that_blocks_cannot_hold_has_its_own_distributions(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Three sequences of 5, 19 and 40 tokens that take turns: log π after the prompt and after four more, to 1e-4."""
    make, caches = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make().eval()
    assert keeps_its_cache(model) is caches
    config = MixtureConfig(["only"], {"only": 1.0}, vocab_size=40, max_position_embeddings=64)
    mixture = MixtureForCausalLM(config, adapters=None, full={"only": model}).eval()
    with caplog.at_level(logging.WARNING):
        runner = runner_of(mixture, max_num_seqs=4)
    assert "decoded in transformers' own cache" in caplog.text
    assert (runner.bytes_per_token > 1) is caches, "what a family keeps is counted, in whatever it keeps it"
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(3, 40, (length + 4,), generator=generator).tolist() for length in (5, 19, 40)]
    lanes = [runner.open(Need((0,), (), 64))[0][0] for _ in texts]
    prompts = [len(text) - 4 for text in texts]
    begun = [Piece(lane, text[:3], 0, (1.0,), 0, False) for lane, text in zip(lanes, texts, strict=True)]
    assert len(runner.run(begun).logits) == 0
    rest = [
        Piece(lane, text[3:length], 3, (1.0,), 1, True)
        for lane, text, length in zip(lanes, texts, prompts, strict=True)
    ]
    found = [[row] for row in runner.run(rest).logits]
    for step in range(4):
        pieces = [
            Piece(lane, text[length + step : length + step + 1], length + step, (1.0,), 1, True)
            for lane, text, length in zip(lanes, texts, prompts, strict=True)
        ]
        for rows, row in zip(found, runner.run(pieces).logits, strict=True):
            rows.append(row)
    for text, length, rows in zip(texts, prompts, found, strict=True):
        with torch.no_grad():
            expected = model(torch.tensor([text])).logits[0, length - 1 :].float().log_softmax(-1)
        torch.testing.assert_close(torch.stack(rows), expected, atol=1e-4, rtol=1e-4)
