"""Fixtures that every kind of test may need; what one kind needs lies beside it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from support.python_path import ahead_on_path

# A machine that does something else as well is no fault of what is tested.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

ROOT = Path(__file__).parents[1]

# What tests start is there sooner: see in that folder.
os.environ["PYTHONPATH"] = ahead_on_path(ROOT / "test" / "support" / "quick_start")


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The demo model's folder. scripts/test puts it there; the test is skipped without it."""
    command = [sys.executable, str(ROOT / "scripts" / "get_demo_model"), "--where"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if found.returncode != 0:
        pytest.skip("the demo model is not there: run scripts/get_demo_model")
    return Path(found.stdout.strip())


@pytest.fixture(scope="module")
def args(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """SGLang's arguments for its own scheduler loop, published; nothing is compiled meanwhile."""
    import torch

    from support_plugin.decode_requests import publish_arguments

    torch.compiler.set_stance("force_eager")
    yield publish_arguments(tmp_path_factory.mktemp("model"))
    torch.compiler.set_stance("default")
