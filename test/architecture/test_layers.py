"""The import contracts in pyproject.toml hold: layers, and who may import sglang and torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
LINT = (sys.executable, "-c", "from importlinter.cli import lint_imports_command as run; run()")


def lint(root: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*LINT, "--config", str(root / "pyproject.toml"), "--no-cache"],
        cwd=root,
        env={"PYTHONPATH": str(root / "python"), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_contracts_hold() -> None:
    result = lint(ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 broken" in result.stdout


def copy_with(tmp_path: Path, module: str, line: str) -> Path:
    """A copy of the package in which `module` starts with `line`."""
    for source in (ROOT / "python").rglob("*.py"):
        target = tmp_path / source.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(source.read_text())
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    offender = tmp_path / "python" / "tiered_kv" / module
    offender.write_text(
        offender.read_text().replace("import annotations\n", f"import annotations\n{line}\n", 1)
    )
    return tmp_path


def test_an_upward_import_is_caught(tmp_path: Path) -> None:
    root = copy_with(tmp_path, "forest/key.py", "import tiered_kv.memory.manager")
    result = lint(root)
    assert result.returncode != 0
    assert "tiered_kv.forest.key -> tiered_kv.memory.manager" in result.stdout


def test_an_import_of_sglang_outside_plugin_is_caught(tmp_path: Path) -> None:
    root = copy_with(tmp_path, "tiers/host.py", "import sglang")
    result = lint(root)
    assert result.returncode != 0
    assert "tiered_kv.tiers.host -> sglang" in result.stdout


def test_an_import_of_torch_in_a_pure_package_is_caught(tmp_path: Path) -> None:
    root = copy_with(tmp_path, "memory/manager.py", "import torch")
    result = lint(root)
    assert result.returncode != 0
    assert "tiered_kv.memory.manager -> torch" in result.stdout
