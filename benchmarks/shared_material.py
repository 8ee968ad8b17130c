"""Where the shared material is, for the benchmarks that need it."""

from __future__ import annotations

import os
from pathlib import Path


def find_testbed() -> Path | None:
    """The testbed's directory; None, and a line that says where it was looked for, where there is none."""
    shared = Path(os.environ.get("MPO_RAY_SHARED") or Path(__file__).parents[2] / "shared")
    testbed = shared / "testbed" / "imdb"
    if testbed.is_dir():
        return testbed
    print(f"skipped: the testbed is not at {testbed}; set MPO_RAY_SHARED")
    return None
