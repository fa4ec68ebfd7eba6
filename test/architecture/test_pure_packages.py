"""The pure packages can be imported, all of them, where torch and sglang cannot.

One fresh interpreter per package: what an earlier test imported must not hide a dependency.
"""

from __future__ import annotations

import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "python"
PURE = ("core", "api", "metrics", "forest", "memory", "scheduler", "simulation", "snapshot")
EXISTING = [name for name in PURE if (SOURCE / "tiered_kv" / name).is_dir()]

IMPORT_ALL = """
import importlib, pkgutil, sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "sglang", "sgl_kernel", "triton", "transformers"}:
            raise ImportError(f"a pure package imports {name}")

sys.meta_path.insert(0, Block())
package = importlib.import_module(sys.argv[1])
for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
"""


def import_all(package: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, package],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_there_are_pure_packages() -> None:
    assert {"core", "forest", "memory"} <= set(EXISTING)


@pytest.mark.parametrize("package", EXISTING)
def test_imports_without_torch_and_sglang(package: str) -> None:
    modules = list(pkgutil.iter_modules([str(SOURCE / "tiered_kv" / package)]))
    assert modules, f"tiered_kv.{package} has no modules"
    result = import_all(f"tiered_kv.{package}")
    assert result.returncode == 0, result.stderr


def test_the_block_works() -> None:
    result = import_all("tiered_kv.plugin")
    assert result.returncode != 0
    assert "a pure package imports" in result.stderr
