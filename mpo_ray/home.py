"""`~` at the beginning of a path: the shell replaces it only at the beginning of a word, never in a run file."""

from __future__ import annotations

import os.path
from typing import Annotated

from pydantic import AfterValidator


def expand_home(text: str) -> str:
    """A text that begins with `~/` or `~user/` with the home directory in its place; any other as it is.

    Raises ValueError for a user who has none.
    """
    if not text.startswith("~"):
        return text
    expanded = os.path.expanduser(text)
    if expanded == text:
        raise ValueError(f"{text!r}: there is no home directory for {text.partition('/')[0]!r}; write the whole path.")
    return expanded


#: A path in a run file, or a name such as a hub id.
PathText = Annotated[str, AfterValidator(expand_home)]
