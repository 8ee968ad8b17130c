"""One answer from a mixture artefact, as the command line gives it."""

from __future__ import annotations

from collections.abc import Mapping

from mpo_ray.data.tokens import prompt_token_ids
from mpo_ray.decoding.batch import sample_completions
from mpo_ray.decoding.particles import sample_from_particles
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
    if particles < 1:
        raise ValueError(f"--particles {particles}: 1 decodes token by token, more draw whole answers.")
    if particles > 1 and temperature != 1.0:
        raise ValueError(
            f"--temperature {temperature:g}: {particles} particles draw from π_λ, which has the temperature 1; leave "
            "one of both out."
        )
    tokenizer = load_tokenizer(artefact)
    model = MixtureForCausalLM.from_pretrained(artefact, weights=weights, device_map="auto")
    prompt: Prompt = ({"role": "user", "content": text},) if getattr(tokenizer, "chat_template", None) else text
    prompts = [prompt_token_ids(tokenizer, prompt)]
    special = {"eos_id": tokenizer.eos_token_id, "pad_id": tokenizer.pad_token_id}
    how = {"num_completions": 1, "max_new_tokens": max_tokens, "seed": seed, **special}
    if particles == 1:
        [[completion]] = sample_completions(model, prompts, temperature=temperature, **how)
    else:
        [[completion]] = sample_from_particles(model, prompts, num_particles=particles, **how)
    return str(tokenizer.decode(completion.ids, skip_special_tokens=True))
