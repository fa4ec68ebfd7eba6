"""Fresh Python processes, and a way to change SGLang beneath the plugin in all of them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from support.python_path import ahead_on_path
from support.tiny_llama import write_config

Shim = Callable[[str], dict[str, str]]
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Llama's configuration, for `--load-format dummy`."""
    return write_config(tmp_path_factory.mktemp("model"))


@pytest.fixture
def shim(tmp_path: Path) -> Shim:
    """Has the given code run at the start of every Python process; returns the environment."""

    def write(code: str) -> dict[str, str]:
        folder = tmp_path / "shim"
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(code)
        return {"PYTHONPATH": ahead_on_path(folder)}

    return write


@pytest.fixture(scope="session")
def run_python(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs `python *argv` in a process of its own; output is text."""

    def run(
        *argv: str, env: dict[str, str] | None = None, timeout_s: float = 300
    ) -> subprocess.CompletedProcess[str]:
        # XDG_CACHE_HOME: the disk tier's default directory; the user's own is not for tests.
        cache = str(tmp_path_factory.mktemp("cache"))
        environment = {**os.environ, "XDG_CACHE_HOME": cache, **(env or {})}
        return subprocess.run(
            [sys.executable, *argv],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env=environment,
            check=False,
        )

    return run
