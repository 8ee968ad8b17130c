"""One answer from a mixture artefact, as the command line gives it."""

from __future__ import annotations

from collections.abc import Mapping

from mpo_ray.data.tokens import prompt_token_ids
from mpo_ray.decoding.batch import sample_completions
from mpo_ray.policies.loading import load_tokenizer
from mpo_ray.policies.mixture import MixtureForCausalLM
from mpo_ray.records import Prompt


def answer(
    artefact: str, text: str, *, weights: Mapping[str, float] | None, max_tokens: int, temperature: float, seed: int
) -> str:
    """Decode the token-level mixture; `text` is a user's message where the tokenizer has a chat template."""
    tokenizer = load_tokenizer(artefact)
    model = MixtureForCausalLM.from_pretrained(artefact, weights=weights, device_map="auto")
    prompt: Prompt = ({"role": "user", "content": text},) if getattr(tokenizer, "chat_template", None) else text
    [[completion]] = sample_completions(
        model,
        [prompt_token_ids(tokenizer, prompt)],
        num_completions=1,
        max_new_tokens=max_tokens,
        temperature=temperature,
        eos_id=tokenizer.eos_token_id,
        pad_id=tokenizer.pad_token_id,
        seed=seed,
    )
    return str(tokenizer.decode(completion.ids, skip_special_tokens=True))
