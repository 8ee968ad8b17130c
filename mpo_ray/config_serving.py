"""The part of a run file that says how the endpoint is served, and within which limits."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from mpo_ray.config_training import Strict

#: Arguments of vLLM's that follow from what it opens and from other settings.
SET_FOR_VLLM = frozenset(
    {"model", "tokenizer", "trust_remote_code", "logprobs_mode", "max_logprobs", "max_num_seqs", "max_model_len",
     "skip_tokenizer_init", "generation_config", "disable_log_stats", "runner", "hf_overrides"}
)  # fmt: skip


def check_vllm_arguments(engine: str, arguments: Mapping[str, Any], *, taken: Set[str]) -> None:
    """Refuse, by ValueError, arguments for an engine that is not chosen, and those that are not the operator's."""
    if arguments and engine != "vllm":
        raise ValueError("vllm: these arguments are for engine: vllm; set it, or leave them out")
    if wrong := sorted(taken & arguments.keys()):
        raise ValueError(f"vllm.{wrong[0]}: it follows from the artefact and the other settings; leave it out")


Precision = Annotated[
    Literal["fp32", "bf16", "fp16", "auto"],
    Field(description="of weights and KV cache; auto is that of the files, or fp32 on a CPU that is slower in it"),
]


class Serve(Strict):
    """The endpoint on Ray Serve: its address, its replicas, its engines, its limits."""

    host: str = Field("127.0.0.1", description="address to listen on; loopback unless told otherwise")
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    api_key_env: str | None = Field(None, description="environment variable that holds the key; no check if absent")
    api_keys_env: str | None = Field(
        None, description="environment variable that holds several keys, separated by commas or white space"
    )
    allow_open: bool = Field(False, description="listen on a host other than loopback without an API key")
    allowed_origins: list[str] = Field([], description="web pages whose scripts may call (CORS)")

    min_replicas: PositiveInt = 1
    max_replicas: PositiveInt = 4
    target_ongoing_requests: PositiveFloat = Field(
        8.0, description="per replica; above it Serve adds replicas, below it takes them away"
    )
    max_ongoing_requests: PositiveInt | None = Field(
        None, description="per replica, at most; twice the target if absent"
    )
    max_queued_requests: PositiveInt = Field(64, description="above it requests are refused with 429")
    upscale_delay_s: Annotated[float, Field(ge=0.0)] = 30.0
    downscale_delay_s: Annotated[float, Field(ge=0.0)] = 600.0
    cpus_per_replica: PositiveFloat = 1.0
    gpus_per_replica: Annotated[float, Field(ge=0.0)] = 0.0
    health_check_period_s: PositiveFloat = 10.0
    health_check_timeout_s: PositiveFloat = 30.0
    stuck_after_s: PositiveFloat = Field(
        120.0, description="seconds that one step of an engine may take before its replica is replaced"
    )
    request_timeout_s: PositiveFloat = Field(
        600.0, description="of a whole answer; a replica that is told to stop has as long to finish what it decodes"
    )
    retry_s: PositiveFloat = Field(
        30.0, description="seconds in which a request without a token yet is tried again after its replica died"
    )

    engine: Literal["mpo", "vllm"] = Field("mpo", description="what decodes; docs/serving.md says when to choose which")
    vllm: dict[str, Any] = Field({}, description="further arguments of vLLM's AsyncEngineArgs, for engine: vllm")
    precision: Precision = "auto"
    kv_cache_gib: PositiveFloat | None = Field(
        None, description="memory of a replica's KV cache; a quarter of what is free if absent, 0.8 of a GPU's"
    )
    max_num_seqs: PositiveInt = Field(64, description="sequences that a replica decodes at a time, particles included")
    context: PositiveInt | None = Field(None, description="tokens of a sequence, at most; the model's own if absent")
    max_waiting: PositiveInt = Field(1024, description="completions that wait in a replica for their turn, at most")
    prompt_tokens_per_step: PositiveInt = Field(
        128, description="tokens of prompts that a step computes beside the running completions; vLLM has its own rule"
    )
    messages_per_step: PositiveFloat = Field(
        4.0,
        description="pieces of streams that a replica sends in a step, about at most: with more streams each holds "
        "several tokens; first tokens and ends do not wait",
    )

    max_tokens: PositiveInt = Field(256, description="default and upper limit of a request's max_tokens")
    max_prompt_tokens: PositiveInt | None = Field(None, description="of one prompt; what the context leaves if absent")
    max_body_bytes: PositiveInt = 4 * 2**20
    max_prompts: PositiveInt = Field(128, description="prompts of one request")
    max_choices: PositiveInt = Field(128, description="prompts × n of one request")
    max_n: PositiveInt = 32
    max_work: PositiveInt = Field(262_144, description="policies × particles × choices × max_tokens of one request")
    requests_per_minute: PositiveFloat | None = Field(None, description="of one API key; no limit if absent")

    @model_validator(mode="before")
    @classmethod
    def _older_names(cls, values: Any) -> Any:
        """`num_lanes` was what `max_num_seqs` is, in runs of version 0.1."""
        if isinstance(values, dict) and "num_lanes" in values and "max_num_seqs" not in values:
            values = {"max_num_seqs" if key == "num_lanes" else key: value for key, value in values.items()}
        return values

    @model_validator(mode="after")
    def _replicas_in_order(self) -> Serve:
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas {self.max_replicas} is below min_replicas {self.min_replicas}")
        if self.ongoing_requests < self.target_ongoing_requests:
            raise ValueError(
                f"max_ongoing_requests {self.max_ongoing_requests} is below target_ongoing_requests "
                f"{self.target_ongoing_requests:g}: replicas would never be seen as busy, and none added"
            )
        check_vllm_arguments(self.engine, self.vllm, taken=SET_FOR_VLLM)
        return self

    @property
    def least_tokens(self) -> int:
        """Of one request, for which a KV cache has to be large enough: a whole context where one was asked for."""
        return self.context or (self.max_prompt_tokens or self.max_tokens) + self.max_tokens

    @property
    def ongoing_requests(self) -> int:
        """Requests that a replica takes at a time; more wait in the ingress."""
        return self.max_ongoing_requests or max(1, round(2 * self.target_ongoing_requests))
