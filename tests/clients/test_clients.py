"""The first pages of clients that others wrote, each in a process of its own, against a live endpoint.

Python's are in an environment of their own (`make clients`), because they want other versions than the project's.
npm's are installed beside their scripts, in the versions of package.json, and kept.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.clients.conftest import Endpoint
from tests.serving.live import NAME

HERE = Path(__file__).parent
PYTHON = HERE.parents[1] / ".venv-clients/bin/python"
QUIET = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LANGSMITH_TRACING": "false"}


def missing(what: str) -> None:
    """A client that is not there is skipped by name, but not where everything is tested."""
    pytest.fail(what) if os.environ.get("CI") == "true" else pytest.skip(what)


def said(runner: str | Path, script: str, endpoint: Endpoint) -> list[str]:
    """The lines that a script prints. It has to succeed."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "OPENAI", "LLM_"))}
    command = [str(runner), str(HERE / script), endpoint.url, endpoint.key, NAME]
    done = subprocess.run(command, env=kept | QUIET, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


@pytest.fixture(scope="session")
def python() -> Path:
    if not PYTHON.exists():
        missing("Python's clients are not installed; make clients")
    return PYTHON


@pytest.fixture(scope="session")
def node() -> str:
    found, npm = shutil.which("node"), shutil.which("npm")
    if found is None or npm is None:
        missing("node and npm are not installed")
    wanted, installed = HERE / "package.json", HERE / "node_modules/.installed"
    if not installed.exists() or installed.read_text() != wanted.read_text():
        command = [str(npm), "install", "--no-audit", "--no-fund", "--no-package-lock", "--prefix", str(HERE)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        if done.returncode:
            missing(f"npm cannot install its clients: {done.stderr[-500:]}")
        shutil.copy(wanted, installed)
    return str(found)


@pytest.mark.slow
def test_litellm(python: Path, endpoint: Endpoint) -> None:
    """Its errors are told apart, and its router takes the other model for a prompt that is too long."""
    lines = said(python, "litellm_pages.py", endpoint)
    assert lines[3:] == [
        "ContextWindowExceededError",
        "AuthenticationError",
        "NotFoundError",
        "BadRequestError",
        "from the other",
    ]
    assert all(lines[:3])


def test_langchain(python: Path, endpoint: Endpoint) -> None:
    lines = said(python, "langchain_pages.py", endpoint)
    assert lines[-1] == "OpenAIContextOverflowError"
    assert len(lines) == 5
    assert all(lines)


@pytest.mark.parametrize(("script", "num_texts"), [("pydantic_ai_pages.py", 3), ("llm_pages.py", 4)])
def test_other_clients_of_python(python: Path, endpoint: Endpoint, script: str, num_texts: int) -> None:
    lines = said(python, script, endpoint)
    assert len(lines) == num_texts
    assert all(lines)


def test_the_openai_client_of_npm(node: str, endpoint: Endpoint) -> None:
    lines = said(node, "openai_pages.mjs", endpoint)
    assert lines[3:] == ["context_length_exceeded messages"]
    assert all(lines[:3])


def test_the_ai_sdk(node: str, endpoint: Endpoint) -> None:
    lines = said(node, "ai_sdk_pages.mjs", endpoint)
    assert len(lines) == 3
    assert all(lines)
