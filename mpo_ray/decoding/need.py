"""What a request can need of the KV cache, and what is said of a cache that is too small for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mpo_ray.decoding.protocol import GenerationRequest
from mpo_ray.policies.kv_blocks import BLOCK_TOKENS, blocks_for
from mpo_ray.policies.loading import ModelError
from mpo_ray.policies.memory import GIB, gib

#: Tokens of a prompt from which on sequences share its blocks: of shorter ones each has a copy, which is read faster.
SHARED_FROM = 128
#: Tokens of a request by which a KV cache is described.
USUAL_REQUEST = 512


@dataclass(frozen=True, slots=True)
class Need:
    """What a request can need of the KV cache.

    prompt: its tokens; new_tokens: of the completion, at most; num_seqs: that share the prompt and differ behind it
    reads_prompt: the prompt may go on from blocks that hold its beginning; keeps: the completion's blocks may serve
    later prompts
    """

    policies: tuple[int, ...]
    prompt: tuple[int, ...]
    new_tokens: int
    num_seqs: int = 1
    reads_prompt: bool = True
    keeps: bool = True

    @property
    def num_tokens(self) -> int:
        """Of each sequence."""
        return len(self.prompt) + self.new_tokens

    @property
    def shared_blocks(self) -> int:
        """Of each policy: blocks that a prompt of SHARED_FROM tokens or more fills, which all sequences read."""
        shares = self.num_seqs > 1 and len(self.prompt) >= SHARED_FROM
        return len(self.prompt) // BLOCK_TOKENS if shares else 0

    @property
    def blocks_per_policy(self) -> int:
        own = blocks_for(self.num_tokens) - self.shared_blocks
        return self.shared_blocks + self.num_seqs * own


def need_of(request: GenerationRequest, policies: Sequence[int]) -> Need:
    """policies: that take part"""
    sampling = request.sampling
    return Need(
        tuple(policies),
        request.prompt_ids,
        sampling.max_tokens,
        request.mode.particles,
        reads_prompt=not sampling.prompt_logprobs,
        keeps=request.mode.kind == "token",
    )


def pool_tokens(
    num_bytes: int, bytes_per_token: int, max_num_seqs: int, longest: Sequence[int | None]
) -> tuple[int, int]:
    """How many tokens a KV cache of as many bytes holds, and how many each sequence may have.

    Of sequences that every policy takes part in. The cache is never larger than as many sequences of a whole context
    need. bytes_per_token: of such a sequence; longest: limits of a sequence, None where one names no end
    """
    num_blocks = num_bytes // (bytes_per_token * BLOCK_TOKENS)
    context = min((limit for limit in longest if limit is not None), default=None)
    if context is None:
        return num_blocks * BLOCK_TOKENS, num_blocks * BLOCK_TOKENS
    return min(num_blocks, max_num_seqs * blocks_for(context)) * BLOCK_TOKENS, context


def describe_pool(num_tokens: int, bytes_per_token: int, context: int) -> str:
    """What a KV cache holds. num_tokens: of sequences that every policy takes part in; bytes_per_token: of those"""
    request = min(USUAL_REQUEST, context)
    return (
        f"{gib(num_tokens * bytes_per_token)} of KV cache: {num_tokens:,} tokens of this mixture, "
        f"{num_tokens // request:,} requests of {request:,}"
    )


def check_pool(num_tokens: int, bytes_per_token: int, request_tokens: int) -> None:
    """Raises ModelError where a KV cache does not hold one request of as many tokens. See `describe_pool`."""
    wanted = blocks_for(request_tokens) * BLOCK_TOKENS
    if wanted > num_tokens:
        enough = -(-wanted * bytes_per_token * 1000 // GIB) / 1000  # rounded up
        raise ModelError(
            f"kv_cache_gib: {gib(num_tokens * bytes_per_token)} of KV cache holds {num_tokens:,} tokens of this "
            f"mixture, and one request can need {request_tokens:,}. Set kv_cache_gib to {enough:g} or more, or lower "
            "max_tokens or context."
        )


def too_many(num_seqs: int, most: int) -> str:
    return f"{num_seqs} particles are more sequences than are decoded at a time, {most}. Ask for fewer particles."


def too_large(need: Need, wanted: int, most: int) -> str:
    fewer = "particles, " if need.num_seqs > 1 else ""
    return (
        f"{len(need.prompt)} tokens of prompt and {need.new_tokens} new ones need {wanted} KV-cache blocks (sequences: "
        f"{need.num_seqs}, policies: {len(need.policies)}), and there are {most}. Ask for fewer {fewer}tokens, or let "
        "the server have more (kv_cache_gib)."
    )
