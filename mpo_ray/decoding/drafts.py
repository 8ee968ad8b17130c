"""A completion in the making: its tokens, its text, and when it ends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mpo_ray.decoding.protocol import FinishReason, GenerationRequest, Sampling, TokenLogprob
from mpo_ray.decoding.text_stream import TextStream
from mpo_ray.decoding.token_choice import History


@dataclass(frozen=True, slots=True)
class Rules:
    """What decides where a completion ends, and how its tokens become text.

    tokenizer: None for no text; prompt_ids: of the text that the completion continues, none for a reply
    """

    sampling: Sampling
    eos_ids: tuple[int, ...]
    tokenizer: Any
    prompt_ids: tuple[int, ...] = ()

    @classmethod
    def of(cls, request: GenerationRequest, eos_ids: tuple[int, ...], tokenizer: Any) -> Rules:
        return cls(request.sampling, eos_ids, tokenizer, request.prompt_ids if request.continues_text else ())

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The token ids that end a completion."""
        ends = () if self.sampling.ignore_eos else self.eos_ids
        return (*ends, *self.sampling.stop_ids)

    def text_stream(self) -> TextStream | None:
        if self.tokenizer is None:
            return None
        return TextStream(self.tokenizer, self.sampling.stop, self.prompt_ids)


@dataclass(slots=True)
class Draft:
    """One sequence in its lane. `text` is None where nobody reads it as it grows."""

    lane: int
    text: TextStream | None
    history: History
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    log_z: float = 0.0
    finish: FinishReason | None = None
    stop: str | int | None = None

    def fork(self, lane: int) -> Draft:
        """The same so far, to go on by itself in another lane."""
        text = None if self.text is None else self.text.copy()
        history = replace(self.history, counts=Counter(self.history.counts))
        return replace(self, lane=lane, text=text, history=history, tokens=[*self.tokens], logprobs=[*self.logprobs])

    def extend(self, token: int, rules: Rules) -> str:
        """Add a token; returns the text that is now certain. Sets `finish` where it ends."""
        sampling = rules.sampling
        self.tokens.append(token)
        self.history.add(token)
        if token in rules.end_ids:
            self.finish = "stop"
            self.stop = None if token in rules.eos_ids and not sampling.ignore_eos else token
            return "" if self.text is None else self.text.finish()
        text = ""
        if self.text is not None:
            self.text.watching = len(self.tokens) > sampling.min_tokens
            text = self.text.push(token)
        if self.text is not None and self.text.stopped:
            self.finish, self.stop = "stop", self.text.found
        elif len(self.tokens) >= sampling.max_tokens:
            self.finish = "length"
            text += "" if self.text is None else self.text.finish()
            if self.text is not None and self.text.stopped:
                self.finish, self.stop = "stop", self.text.found
        return text


def token_logprob(
    logits: Tensor, token: int, *, num_top: int, by_policy: Mapping[str, float] | None, log_z: float | None
) -> TokenLogprob:
    """Look up a token and the `num_top` likeliest under the mixture. logits: (V,), up to a constant."""
    logprobs = logits.log_softmax(-1)
    values, tokens = logprobs.topk(min(num_top, len(logprobs)))
    top = tuple(zip(tokens.tolist(), values.tolist(), strict=True))
    return TokenLogprob(token, float(logprobs[token]), top, by_policy, log_z)


def prompt_logprobs(logits: Tensor, tokens: Sequence[int], *, num_top: int) -> list[TokenLogprob]:
    """Look up each token at its place. logits: (T, V), up to a constant of each row; tokens: T ids."""
    logprobs = logits.log_softmax(-1)
    drawn = logprobs.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
    values, places = (part.tolist() for part in logprobs.topk(min(num_top, logprobs.shape[1])))
    return [
        TokenLogprob(token, value, tuple(zip(ids, likeliest, strict=True)))
        for token, value, ids, likeliest in zip(tokens, drawn, places, values, strict=True)
    ]
