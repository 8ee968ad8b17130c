"""What an endpoint serves, and within which limits."""

from __future__ import annotations

from dataclasses import dataclass

from mpo_ray.decoding.protocol import ExactMethod


@dataclass(frozen=True, slots=True)
class Served:
    """One mixture behind one endpoint. All limits are of one HTTP request.

    name: the model id; objectives: in the mixture's order; context: tokens of prompt and completion, None for no limit
    max_tokens: of a completion, at most and where a request does not say
    has_reference: whether what decodes also has the base of the policies' adapters (`Runner.has_reference`)
    exact_methods: of exact mode, the default first
    key_digests: SHA-256 of each API key that is let in, hexadecimal; none asks for no key
    requests_per_minute: of one key, on average; as many may come at once. None for no limit
    allowed_origins: web pages whose scripts may call (CORS)
    timeout_s: seconds for a whole answer; max_body: bytes; max_depth: brackets of JSON within each other
    max_prompts, max_n, max_choices: prompts, choices of each, and their product
    max_prompt_tokens: of one prompt, None for what the context leaves
    max_work: policies × particles × choices × max_tokens
    """

    name: str
    objectives: tuple[str, ...]
    context: int | None
    max_tokens: int
    has_reference: bool = False
    exact_methods: tuple[ExactMethod, ...] = ("smc", "rejection")
    key_digests: tuple[str, ...] = ()
    requests_per_minute: float | None = None
    allowed_origins: tuple[str, ...] = ()
    timeout_s: float = 600.0
    max_body: int = 4 * 2**20
    max_depth: int = 16
    max_prompts: int = 128
    max_n: int = 32
    max_choices: int = 128
    max_prompt_tokens: int | None = None
    max_work: int = 262_144

    @property
    def longest_prompt(self) -> int | None:
        """Tokens of a prompt, at most: one at least is left for the completion."""
        limits = [self.max_prompt_tokens, None if self.context is None else self.context - 1]
        return min((limit for limit in limits if limit is not None), default=None)
