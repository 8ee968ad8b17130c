"""Answers of a mixture artefact to one prompt, as the command line gives them."""

from __future__ import annotations

from mpo_ray.config_serving import Serve
from mpo_ray.decoding.offline import Completion, Recipe, check_recipe, complete, lanes_for
from mpo_ray.decoding.open_engine import open_engine
from mpo_ray.policies.loading import load_rendering
from mpo_ray.policies.mixture_config import MixtureConfig
from mpo_ray.records import Prompt


def answer(
    artefact: str, text: str, recipe: Recipe, *, num: int, seed: int, serve: Serve | None = None
) -> list[Completion]:
    """Decode `num` completions, with the seeds `seed`, `seed` + 1 …

    serve: of the engine, its own defaults if absent
    text: a user's message where the tokenizer has a chat template, the beginning of a text elsewhere
    Raises RequestError before a model is opened.
    """
    config = MixtureConfig.from_pretrained(artefact)
    rendering = load_rendering(artefact, text=config.text)
    prompt: Prompt = ({"role": "user", "content": text},) if rendering.has_template else text
    ids = rendering.prompt_ids(prompt)
    serve = serve or Serve()
    check_recipe(recipe, config, ids, serve.context)
    context = len(ids) + max(1, recipe.sampling.max_tokens)
    engine = open_engine(
        artefact,
        max_num_seqs=lanes_for(recipe, min(serve.max_num_seqs, num * recipe.mode.particles)),
        context=context,
        kv_cache_gib=serve.kv_cache_gib,
        least_tokens=context,
        precision=serve.precision,
    )
    requests = [
        recipe.request(str(sample), ids, seed=seed + sample, continues_text=isinstance(prompt, str))
        for sample in range(num)
    ]
    return complete(engine, requests)
