"""The token-level mixture of K policies as one transformers model (design 2.3, eq. 7).

It is q of equation (7), decoded token by token, not the sequence-level mixture π_λ of the theory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep

from mpo_ray.data.limits import longest_text
from mpo_ray.data.tokens import TokenBatch
from mpo_ray.maths.log_linear import mix_logprobs
from mpo_ray.policies.adapters import AdapterStack, repeat_rows
from mpo_ray.policies.apart import ApartCache
from mpo_ray.policies.artefact import check_artefact, policy_path, reference_path
from mpo_ray.policies.cache import CachePart, MixtureCache, growing_cache
from mpo_ray.policies.completion_model import CompletionModel
from mpo_ray.policies.ensemble import Ensemble
from mpo_ray.policies.loading import ModelError
from mpo_ray.policies.mixture_config import MixtureConfig
from mpo_ray.policies.own_cache import keeps_its_cache
from mpo_ray.policies.precision import PRECISIONS
from mpo_ray.policies.ragged_attention import carries_states
from mpo_ray.records import REFERENCE, check_weights


class MixtureForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """K policies with one vocabulary; logits are Σ_k λ_k log π_k(v | y_<t).

    They are log-probabilities up to a constant per position: softmax of them is q_t. A policy is a model of its own or
    one of several LoRA adapters on a shared base, which are one forward pass of K groups of rows. Weights come from the
    artefact, from `set_weights`, or per row from the argument `mixture_weights` (B, K) of `forward` and `generate`; a
    policy whose weights are all 0 is not run. `forward` leaves the model as it was, so that threads may share it, if
    each has its own cache and gives its weights as `mixture_weights`.
    """

    config_class = MixtureConfig
    main_input_name = "input_ids"
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(
        self, config: MixtureConfig, *, adapters: AdapterStack | None, full: Mapping[str, PreTrainedModel]
    ) -> None:
        """adapters: the objectives whose policies are LoRA adapters; full: the models of all the others."""
        super().__init__(config)
        stacks = [] if adapters is None else [adapters]
        self.branches = nn.ModuleList([*stacks, *full.values()])
        places = {name: len(stacks) + index for index, name in enumerate(full)}
        self._places = [places.get(name, 0) for name in config.objectives]
        self._rows_apart = any(carries_states(base.config) is not None for base in self._bases)
        self._caches_kept: dict[int, bool] | None = None
        self.requires_grad_(False)
        self.set_weights(config.weights)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        config: MixtureConfig | None = None,
        weights: Mapping[str, float] | None = None,
        dtype: str | torch.dtype | None = None,
        device_map: Any = None,
        **kwargs: Any,
    ) -> MixtureForCausalLM:
        """Open a mixture artefact, after checking that it is what was written. Raises ModelError.

        weights: in the place of the artefact's λ, 0 for objectives left out; dtype: float32, bfloat16 or float16
        device_map: one device for everything; dtype and device are the artefact's own and the CPU if absent
        """
        directory = Path(pretrained_model_name_or_path)
        config = config or mixture_config(directory)
        if unused := sorted(key for key, value in kwargs.items() if value and key not in _HANDLED_BY_AUTO):
            raise ModelError(f"{directory}: a mixture cannot be loaded with {', '.join(unused)}; leave them out.")
        if weights is not None:
            config.weights = check_weights(weights, config.objectives, where="weights")
        check_artefact(directory, config)
        precision = _precision(dtype if dtype not in (None, "auto") else config.dtype)
        paths = {name: str(policy_path(directory, name)) for name in config.objectives}
        device = device_map.get("") if isinstance(device_map, dict) else device_map
        ensemble = Ensemble(
            reference_path(directory, config),
            paths,
            precision=precision,
            device=None if device == "auto" else str(torch.device("cpu" if device is None else device)),
            with_reference=False,
        )
        _checked_sizes(ensemble, where=str(directory))
        model: MixtureForCausalLM = cls(config, adapters=ensemble.adapters, full=ensemble.full).eval()
        model.name_or_path = str(directory)
        model.generation_config = GenerationConfig.from_pretrained(directory)
        return model

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Refused: the artefact holds files that are not in memory, such as its fit. Raises ModelError."""
        raise ModelError(
            "A mixture is saved by copying its directory; mpo_ray.policies.artefact.write_artefact makes a new one."
        )

    @property
    def objectives(self) -> list[str]:
        return list(self.config.objectives)

    @property
    def has_reference(self) -> bool:
        """Whether it holds the reference, as the base of adapters; `running` gives it under the number K."""
        return isinstance(self.branches[0], AdapterStack)

    @property
    def _bases(self) -> list[Any]:
        """The causal LM of each branch."""
        return [branch.base if isinstance(branch, AdapterStack) else branch for branch in self.branches]

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Change λ, by objective; those left out have weight 0. Raises ValueError if it is not on the simplex."""
        self.config.weights = check_weights(weights, self.config.objectives, where="weights")
        self._weights = torch.tensor(list(self.config.weights.values()), dtype=torch.float64)

    def get_input_embeddings(self) -> nn.Module:
        embeddings: nn.Module = self._bases[0].get_input_embeddings()
        return embeddings

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: MixtureCache | ApartCache | None = None,
        use_cache: bool | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        mixture_weights: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits Σ_k λ_k log π_k, (B, T, V) in float32.

        mixture_weights: (B, K) λ of each row; any finite values, so λ/τ is sequence temperature τ
        past_key_values: from a call with weights that were positive for the same policies, or for more (those it
        holds are all run, so that it stays whole)
        """
        if mixture_weights is None:
            weights = self._weights.expand(input_ids.shape[0], -1)
        else:
            weights = _checked_rows(mixture_weights, input_ids.shape[0], len(self._places))
        active = (weights != 0).any(dim=0).nonzero()[:, 0].tolist()
        use_cache = self.config.use_cache if use_cache is None else use_cache
        cache = past_key_values
        if isinstance(cache, ApartCache) or (cache is None and use_cache and self._rows_apart):
            return self._forward_apart(input_ids, attention_mask, cache, logits_to_keep, weights, active)
        if cache is None:
            branches = self.branches_of(active)
            if use_cache:
                cache = MixtureCache({b: CachePart(self._empty_cache(b), ks) for b, ks in branches.items()})
        elif cache.policies >= set(active):
            branches = {place: part.policies for place, part in cache.parts.items()}
        else:
            raise ValueError(_LATE_POLICY)
        logprobs = []
        for place, policies in branches.items():
            logits = self._run(
                place,
                policies,
                input_ids=repeat_rows(input_ids, len(policies)),
                attention_mask=repeat_rows(attention_mask, len(policies)),
                position_ids=repeat_rows(position_ids, len(policies)),
                past_key_values=None if cache is None else cache.parts[place].cache,
                use_cache=cache is not None,
                logits_to_keep=logits_to_keep,
            )
            grouped = logits.view(len(policies), -1, *logits.shape[1:])
            logprobs.append(torch.log_softmax(grouped.float(), dim=-1))
        order = [k for policies in branches.values() for k in policies]
        stacked = logprobs[0] if len(logprobs) == 1 else torch.cat(logprobs)
        logits = mix_logprobs(stacked, weights[:, order].T.to(input_ids.device))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1])
        result = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)
        return result if return_dict is not False else result.to_tuple()

    def _forward_apart(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        cache: ApartCache | None,
        logits_to_keep: int | Tensor,
        weights: Tensor,
        active: Sequence[int],
    ) -> CausalLMOutputWithPast:
        """`forward` with a cache for families whose rows are computed one after the other."""
        if cache is None:
            kept = self.caches_kept()
            cache = ApartCache(input_ids.shape[0], {k: kept[k] for k in active})
        elif not cache.policies >= {*active}:
            raise ValueError(_LATE_POLICY)
        num_kept = logits_to_keep if isinstance(logits_to_keep, int) else 0
        found = cache.extend(self.running, input_ids, attention_mask, num_kept)
        logprobs = torch.stack([logits.log_softmax(-1) for logits in found.values()])
        logits = mix_logprobs(logprobs, weights[:, [*found]].T.to(input_ids.device))
        if isinstance(logits_to_keep, Tensor):
            logits = slice_logits_to_keep(logits, logits_to_keep)
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)

    @contextmanager
    def running(self, policy: int) -> Iterator[Any]:
        """The causal LM of one policy by its number, or the adapters' base for K, in this thread and while in here."""
        if policy == len(self._places):
            place, name = 0, REFERENCE
        else:
            place, name = self._places[policy], self.config.objectives[policy]
        branch: Any = self.branches[place]
        if isinstance(branch, AdapterStack):
            with branch.running([name]) as model:
                yield model
        else:
            yield branch

    def longest_texts(self) -> list[int | None]:
        """How many tokens the artefact, and each model in it, can take; None where one names no end."""
        return [self.config.max_position_embeddings, *(longest_text(base.config) for base in self._bases)]

    def caches_kept(self) -> dict[int, bool]:
        """By policy, K for the adapters' base, whether transformers' own cache can be kept for it. Found by trying."""
        if self._caches_kept is None:
            kept = [keeps_its_cache(base) for base in self._bases]
            self._caches_kept = {k: kept[place] for k, place in enumerate(self._places)}
            if self.has_reference:
                self._caches_kept[len(self._places)] = kept[0]
        return self._caches_kept

    @torch.no_grad()
    def predictions(self, batch: TokenBatch) -> Tensor:
        """Logits Σ_k λ_k log π_k (N, V) that predict the completions' N tokens, row after row, by the model's own λ.

        As `CompletionModel` computes them: no padding where the architecture allows it, a shared prompt once.
        """
        active = self._weights.nonzero()[:, 0].tolist()
        logprobs: dict[int, Tensor] = {}
        for place, policies in self.branches_of(active).items():
            branch: Any = self.branches[place]
            if isinstance(branch, AdapterStack):
                with branch.running([self.config.objectives[k] for k in policies]) as base:
                    logits = CompletionModel(base).predictions(batch.repeated(len(policies)))
            else:
                logits = CompletionModel(branch).predictions(batch)
            grouped = logits.view(len(policies), -1, logits.shape[-1]).float().log_softmax(-1)
            logprobs.update(zip(policies, grouped, strict=True))
        stacked = torch.stack([logprobs[k] for k in active]) if len(self.branches) > 1 else grouped
        return mix_logprobs(stacked, self._weights[active].to(stacked.device))

    def branches_of(self, policies: Sequence[int]) -> dict[int, tuple[int, ...]]:
        """The branches that hold these policies, and which of them each holds."""
        places = sorted({self._places[k] for k in policies})
        return {place: tuple(k for k in policies if self._places[k] == place) for place in places}

    def _empty_cache(self, place: int) -> DynamicCache:
        return growing_cache(self._bases[place].config)

    def _run(self, place: int, policies: tuple[int, ...], **inputs: Any) -> Tensor:
        """The logits of one branch, for a group of rows of each of these policies."""
        branch: Any = self.branches[place]
        names = [[self.config.objectives[k] for k in policies]] if isinstance(branch, AdapterStack) else []
        logits: Tensor = branch(*names, **inputs).logits
        return logits

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """`generate()` leaves the cache to `forward`, which makes one for each policy."""
        return False


def mixture_config(directory: Path) -> MixtureConfig:
    """The configuration of the artefact in this directory. Raises ModelError where there is none."""
    if not (directory / "config.json").is_file():
        raise ModelError(f"{directory}: a mixture is opened from its directory; there is no config.json here.")
    config: MixtureConfig = MixtureConfig.from_pretrained(directory)
    return config


def mixture_of(ensemble: Ensemble) -> MixtureForCausalLM:
    """The mixture of an ensemble's own models, even at first; `set_weights` changes it. Raises ModelError.

    It has no file: `artefact.write_artefact` makes one.
    """
    names, size = ensemble.names, _checked_sizes(ensemble, where=", ".join(ensemble.names))
    config = MixtureConfig(names, {name: 1 / len(names) for name in names}, vocab_size=size)
    model: MixtureForCausalLM = MixtureForCausalLM(config, adapters=ensemble.adapters, full=ensemble.full).eval()
    return model


def mixture_of_one(name: str, model: Any) -> MixtureForCausalLM:
    """A model under this name as a mixture of one policy, for what decodes mixtures."""
    config = MixtureConfig([name], {name: 1.0}, vocab_size=model.config.get_text_config().vocab_size)
    mixture: MixtureForCausalLM = MixtureForCausalLM(config, adapters=None, full={name: model}).eval()
    return mixture


def _checked_sizes(ensemble: Ensemble, *, where: str) -> int:
    """The number of tokens of every policy's distribution. Raises ModelError where they differ."""
    bases = {} if ensemble.adapters is None else dict.fromkeys(ensemble.adapters.names, ensemble.adapters.base)
    models = {**bases, **ensemble.full}
    sizes: list[int] = [models[name].config.get_text_config().vocab_size for name in ensemble.names]
    if len(set(sizes)) > 1:
        raise ModelError(
            f"{where}: the output layers of {', '.join(ensemble.names)} differ in size: {sizes}. Train the policies "
            "from the same base model."
        )
    return sizes[0]


_LATE_POLICY = (
    "past_key_values was filled while some of the policies had weight 0; give every policy its weight from the first "
    "token on, or begin again without past_key_values."
)
#: Keywords that AutoModelForCausalLM adds on the way, and those that a mixture satisfies anyway.
_HANDLED_BY_AUTO = frozenset(
    ("adapter_kwargs", "_from_auto", "use_safetensors", "local_files_only", "low_cpu_mem_usage", "revision")
)


def _checked_rows(weights: Tensor, rows: int, num_policies: int) -> Tensor:
    if weights.shape != (rows, num_policies):
        raise ValueError(
            f"mixture_weights has shape {tuple(weights.shape)}; it needs one row per sequence and one column per "
            f"objective: {(rows, num_policies)}."
        )
    if not bool(torch.isfinite(weights).all()) or not bool((weights != 0).any(dim=1).all()):
        raise ValueError("mixture_weights: every weight is finite, and every row has one that is not 0.")
    return weights


def _precision(dtype: str | torch.dtype | None) -> str:
    wanted = str(dtype or "float32").removeprefix("torch.")
    for name, known in PRECISIONS.items():
        if str(known).removeprefix("torch.") == wanted:
            return name
    raise ModelError(f"dtype {wanted} is not supported for a mixture; use float32, bfloat16 or float16.")


AutoModelForCausalLM.register(MixtureConfig, MixtureForCausalLM, exist_ok=True)
