"""One answer from a mixture artefact, as the command line gives it."""

from __future__ import annotations

from collections.abc import Mapping

from mpo_ray.data.tokens import prompt_token_ids
from mpo_ray.decoding.particles import check_particles, sample_mixture
from mpo_ray.policies.loading import load_tokenizer
from mpo_ray.policies.mixture import MixtureForCausalLM
from mpo_ray.records import Prompt


def answer(
    artefact: str,
    text: str,
    *,
    weights: Mapping[str, float] | None,
    max_tokens: int,
    temperature: float,
    seed: int,
    particles: int = 1,
) -> str:
    """Decode the mixture; `text` is a user's message where the tokenizer has a chat template.

    particles: 1 decodes token by token, more draw the whole answer (design 2.3), which needs temperature 1
    Raises ValueError for particles that cannot be, or another temperature with more than one.
    """
    check_particles(particles, temperature)
    tokenizer = load_tokenizer(artefact)
    model = MixtureForCausalLM.from_pretrained(artefact, weights=weights, device_map="auto")
    prompt: Prompt = ({"role": "user", "content": text},) if getattr(tokenizer, "chat_template", None) else text
    [[completion]] = sample_mixture(
        model,
        [prompt_token_ids(tokenizer, prompt)],
        num_particles=particles,
        temperature=temperature,
        num_completions=1,
        max_new_tokens=max_tokens,
        tokenizer=tokenizer,
        seed=seed,
    )
    return str(tokenizer.decode(completion.ids, skip_special_tokens=True))
