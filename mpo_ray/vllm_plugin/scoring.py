"""vLLM in an actor of the scoring stage: log π_k of completions that are there already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mpo_ray.policies.artefact import write_artefact
from mpo_ray.policies.ensemble import Ensemble, Sequences
from mpo_ray.policies.loading import ModelError, is_adapter
from mpo_ray.records import REFERENCE
from mpo_ray.vllm_plugin.arguments import engine_arguments, set_environment, whole_pages

#: Tokens that vLLM keeps the caches of on a CPU, or those of one sequence where it may be longer.
_TOKENS_ON_CPU = 2**15


class VllmEnsemble:
    """`Ensemble.logprobs` by vLLM. The reference, of which samples know log π_ref, is opened when it is asked for.

    max_num_seqs: sequences that vLLM computes at a time, at most; arguments: further ones of vLLM's `EngineArgs`
    """

    def __init__(
        self,
        reference: str,
        policies: Mapping[str, str],
        *,
        precision: str = "fp32",
        max_num_seqs: int = 32,
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        """Raises ModelError for policies that vLLM cannot hold, ConfigError for arguments that it does not have."""
        if not Path(reference).is_dir() and any(is_adapter(path) for path in policies.values()):
            raise ModelError(
                f"scoring.engine: vllm needs the reference of LoRA policies as a directory, not as {reference!r}. Name "
                "a directory in reference.model, or set engine: mpo."
            )
        self._names = list(policies)
        self._reference, self._precision = reference, precision
        self._reference_alone: Ensemble | None = None
        set_environment()
        from vllm import LLM, EngineArgs

        with TemporaryDirectory(prefix="mpo-ray-scoring-") as directory:
            config = write_artefact(
                Path(directory),
                objectives={name: Path(path) for name, path in policies.items()},
                reference=reference,
                copy_policies=False,
                copy_reference=False,
                weights=dict.fromkeys(policies, 1 / len(policies)),
                fit={},
                precision=precision,
            )
            context = (arguments or {}).get("max_model_len", config.max_position_embeddings)
            own = {
                "runner": "pooling",
                "hf_overrides": {"architectures": ["MixtureScorer"]},
                "max_num_seqs": max_num_seqs,
                **({} if context is None else {"max_model_len": context}),
            }
            kept_tokens = max(_TOKENS_ON_CPU, whole_pages(context or 0))
            self._llm = LLM(
                **engine_arguments(
                    directory, config, EngineArgs, own, arguments or {}, where="scoring.vllm", kept_tokens=kept_tokens
                )
            )

    def logprobs(
        self, names: Sequence[str], sequences: Sequences, *, batch_size: int, pad_id: int
    ) -> dict[str, list[float]]:
        """As `Ensemble.logprobs`; batch_size and pad_id are the reference's alone: vLLM has no use for them."""
        values: dict[str, list[float]] = {}
        if REFERENCE in names:
            self._reference_alone = self._reference_alone or Ensemble(self._reference, {}, precision=self._precision)
            values = self._reference_alone.logprobs([REFERENCE], sequences, batch_size=batch_size, pad_id=pad_id)
        wanted = [name for name in names if name != REFERENCE]
        if wanted:
            rows = self._sums(sequences)
            values |= {name: [row[self._names.index(name)] for row in rows] for name in wanted}
        return {name: values[name] for name in names}

    def _sums(self, sequences: Sequences) -> list[list[float]]:
        from vllm import PoolingParams

        from mpo_ray.vllm_plugin.scoring_model import TASK

        answers = self._llm.encode(
            [{"prompt_token_ids": [*prompt, *completion]} for prompt, completion in sequences],
            [PoolingParams(extra_kwargs={"first": len(prompt)}) for prompt, _ in sequences],
            pooling_task=TASK,
            use_tqdm=False,
        )
        return [answer.outputs.data.tolist() for answer in answers]
