"""What a Python has that has torch and Triton, and beside them the bundle's first part alone."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "scripts" / "lib"))

from bundle.packages import normalized  # noqa: E402

#: torch and Triton, and what they may bring along.
HOST = (
    r"nvidia-.*|cuda-.*|torch|triton|filelock|fsspec|jinja2|markupsafe|mpmath|networkx|setuptools"
    r"|sympy|typing-extensions"
)

#: Where Python finds this as `sitecustomize.py`, it has nothing else.
SITECUSTOMIZE = f"""\
import sys
sys.path.append({str(ROOT / "test")!r})
from support import first_part
sys.meta_path.insert(0, first_part.NothingElse())
"""


class NothingElse:
    """A finder that finds none of the packages that are neither of the host nor in the part."""

    def __init__(self) -> None:
        from bundle.cli import FIRST_PACKAGES

        there = re.compile("|".join([HOST, *FIRST_PACKAGES, "sglang-tiered-kv"]))
        self._missing = {
            name
            for name, brought_by in metadata.packages_distributions().items()
            if not any(map(there.fullmatch, map(normalized, brought_by)))
        }

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] in self._missing:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def others(names: Iterable[str], allowed: str) -> list[str]:
    """Those packages that `allowed`, an expression, does not match, however they are written."""
    return [name for name in map(normalized, names) if not re.fullmatch(allowed, name)]
