"""From text to token ids: special tokens that the text spells are tokens, or words like any other."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from mpo_ray.data.fields import BadFieldError


class RenderingError(BadFieldError):
    """A prompt or a reply has no token ids. The message says why, in the words of the template or the tokenizer."""


class UnknownIdError(RenderingError):
    """A prompt or a reply has a token that the model has no row for."""


class TextTokens:
    """A tokenizer's two readings of a text. Not for two threads at a time.

    added: ids of the tokens that stand beside the vocabulary proper; special: those of them that are special
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        known = tokenizer.added_tokens_decoder
        self.special = frozenset(tokenizer.all_special_ids) | {id for id, token in known.items() if token.special}
        self.added = self.special | frozenset(known)
        spelled = sorted({str(token) for id, token in known.items() if id in self.special} - {""})
        self._beginnings = sorted({token[0] for token in spelled})
        self._begun = {token[:n] for token in spelled for n in range(1, len(token))}
        self._longest = max(map(len, spelled), default=0)
        self._spelled = re.compile(f"(?={'|'.join(map(re.escape, spelled))})") if spelled else None
        self._before = self._written_before()

    def as_tokens(self, text: str, *, add_start: bool = False) -> list[int]:
        """Ids of a text in which special tokens count. A start token that the text has already is not doubled."""
        ids = self._encode(text, split_special_tokens=False)["input_ids"]
        if add_start and ids[: len(self._before)] != self._before:
            return [*self._before, *ids]
        return list(ids)

    def as_words(self, text: str, *, add_start: bool = False) -> list[int]:
        """Ids of a text in which nothing is a special token. Raises RenderingError where the tokenizer cannot."""
        ids = [self._as_word(id) for id in self._encode(text, split_special_tokens=True)["input_ids"]]
        return [*self._before, *ids] if add_start else ids

    def start(self) -> int:
        """What stands in the place of a prompt that has no tokens."""
        start = self.tokenizer.bos_token_id
        return int(self.tokenizer.eos_token_id if start is None else start)

    def masks(self, values: Any) -> dict[str, str]:
        """Characters that `values` do not have, for the first ones of special tokens. Raises RenderingError."""
        text = json.dumps(values, ensure_ascii=False, default=str)
        unused = (chr(code) for code in range(0xE000, 0xF8FF) if chr(code) not in text)
        masks = dict(zip(self._beginnings, unused, strict=False))
        if len(masks) < len(self._beginnings):
            raise RenderingError("the messages use every character of Unicode's private use area")
        return masks

    def masked(self, value: Any, masks: Mapping[str, str]) -> Any:
        """A JSON value with the first character of every special token that it spells, or begins to spell, masked."""
        if isinstance(value, str):
            return self._masked_text(value, masks)
        if isinstance(value, Mapping):
            return {self.masked(key, masks): self.masked(one, masks) for key, one in value.items()}
        if isinstance(value, list | tuple):
            return [self.masked(one, masks) for one in value]
        return value

    def ids_and_ends(self, text: str, masks: Mapping[str, str]) -> tuple[list[int], list[int] | None]:
        """Ids of a masked text, whose masked characters are words, and where in `text` each token ends.

        The ends are None where the tokenizer does not tell them, or where tokens of their own stand between words.
        """
        if not any(mask in text for mask in masks.values()):
            offsets = bool(self.tokenizer.is_fast)
            encoded = self._encode(text, split_special_tokens=False, return_offsets_mapping=offsets)
            ends = [end for _, end in encoded["offset_mapping"]] if offsets else None
            return list(encoded["input_ids"]), ends
        if not self.tokenizer.is_fast:
            raise RenderingError("the text spells a special token, which this tokenizer cannot write as words")
        return list(self._unmasked(text, {ord(mask): beginning for beginning, mask in masks.items()})), None

    def _unmasked(self, text: str, beginnings: Mapping[int, str]) -> Iterator[int]:
        """The special tokens of a masked text are the template's; what stands between them is tokenised by itself."""
        encoded = self._encode(text, split_special_tokens=False, return_offsets_mapping=True)
        pairs = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        specials = [(id, span) for id, span in pairs if id in self.special]
        place = 0
        for id, (start, end) in [*specials, (None, (len(text), len(text)))]:
            words = text[place:start].translate(dict(beginnings))
            if words:
                yield from self.as_words(words)
            if id is not None:
                yield id
            place = end

    def _masked_text(self, text: str, masks: Mapping[str, str]) -> str:
        if self._spelled is None or not any(beginning in text for beginning in self._beginnings):
            return text
        places = {found.start() for found in self._spelled.finditer(text)}
        # what the text begins to spell at its end, the next one may complete
        lengths = range(1, min(self._longest, len(text) + 1))
        places.update(len(text) - n for n in lengths if text[-n:] in self._begun)
        if not places:
            return text
        return "".join(masks[one] if place in places else one for place, one in enumerate(text))

    def _as_word(self, id: int) -> int:
        """A special token that the words of a text spell, where the vocabulary knows it as a word as well."""
        unknown = self.tokenizer.unk_token_id
        if id not in self.special or id == unknown:
            return id
        if unknown is None:
            token = self.tokenizer.convert_ids_to_tokens(id)
            raise RenderingError(f"this tokenizer cannot write {token!r} as text; leave it out.")
        return int(unknown)

    def _written_before(self) -> list[int]:
        """What the tokenizer puts in front of every text; what some of them put behind it is left out."""
        alone = self._encode("a", split_special_tokens=False)["input_ids"]
        whole = self.tokenizer("a", add_special_tokens=True, verbose=False)["input_ids"]
        starts = (n for n in range(len(whole)) if whole[n : n + len(alone)] == alone)
        return list(whole[: next(starts, 0)])

    def _encode(self, text: str, *, split_special_tokens: bool, **how: Any) -> Any:
        # Lengths are checked where rows are accepted (limits.py), so the tokenizer need not warn of them.
        how |= {"add_special_tokens": False, "verbose": False, "split_special_tokens": split_special_tokens}
        try:
            return self.tokenizer(text, **how)
        except Exception as error:
            raise RenderingError(f"the tokenizer cannot read this text: {type(error).__name__}: {error}") from error
