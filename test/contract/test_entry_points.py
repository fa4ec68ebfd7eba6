"""An installation that is broken, in real processes: torch is imported, and SGLang says what is up.

The installation is a folder with the metadata that pyproject.toml makes and the one module that its
entry points name, before all others on the path; what is broken is `tiered_kv`.
"""

from __future__ import annotations

import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from support.python_path import ahead_on_path

torch = pytest.importorskip("torch")
pytest.importorskip("sglang")

ROOT = Path(__file__).parents[2]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = SETTINGS["project"]
MODULE = "tiered_kv_entry_points"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

Run = Callable[..., CompletedProcess[str]]

BROKEN = {
    "a dependency": ("import a_missing_dependency\n", "No module named 'a_missing_dependency'"),
    "an error": ("raise RuntimeError('two\\nlines')\n", "RuntimeError: two lines"),
    "half of it": ("", "No module named 'tiered_kv."),
}


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The folder of an installation without `tiered_kv`."""
    folder = tmp_path / "site"
    metadata = folder / f"sglang_tiered_kv-{PROJECT['version']}.dist-info"
    metadata.mkdir(parents=True)
    header = f"Metadata-Version: 2.3\nName: {PROJECT['name']}\nVersion: {PROJECT['version']}\n"
    (metadata / "METADATA").write_text(header)
    groups = (
        "\n".join([f"[{group}]", *(f"{name} = {target}" for name, target in entries.items())])
        for group, entries in PROJECT["entry-points"].items()
    )
    (metadata / "entry_points.txt").write_text("\n".join(groups) + "\n")
    shutil.copy(ROOT / "python" / f"{MODULE}.py", folder)
    return folder


# Each starts processes that import torch or SGLang: one kind of damage is enough most of the time.
@pytest.fixture(
    params=[
        pytest.param(broken, id=name, marks=[pytest.mark.long] if name != "half of it" else [])
        for name, broken in BROKEN.items()
    ]
)
def broken(installed: Path, request: pytest.FixtureRequest) -> tuple[dict[str, str], str]:
    """The environment of a process in which it is broken, and what of it a sentence should say."""
    code, said = request.param
    package = installed / "tiered_kv"
    package.mkdir()
    (package / "__init__.py").write_text(code)
    return environment(installed), said


def environment(folder: Path) -> dict[str, str]:
    return {"PYTHONPATH": ahead_on_path(folder)}


def test_every_entry_point_is_in_the_module_that_needs_nothing() -> None:
    targets = [target for of in PROJECT["entry-points"].values() for target in of.values()]
    assert len(targets) == 3
    assert {target.partition(":")[0] for target in targets} == {MODULE}
    wheel = SETTINGS["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["force-include"] == {f"python/{MODULE}.py": f"{MODULE}.py"}


def test_torch_is_imported_and_one_line_says_what_is_wrong(
    run_python: Run, broken: tuple[dict[str, str], str]
) -> None:
    env, said = broken
    code = "import torch; print(torch.ones(2).sum().item())"
    silent = run_python("-c", code, env=env)
    assert (silent.returncode, silent.stdout, silent.stderr) == (0, "2.0\n", "")
    wanted = run_python("-c", code, "--tiered-kv", env=env)
    assert (wanted.returncode, wanted.stdout) == (0, "2.0\n")
    (line,) = wanted.stderr.splitlines()
    assert line.startswith("warning: loading sglang-tiered-kv failed with ")
    assert said in line


@pytest.mark.slow
def test_a_server_with_the_flag_refuses(
    run_python: Run, broken: tuple[dict[str, str], str], tiny_model: str
) -> None:
    env, said = broken
    ended = run_python(
        *("-m", "sglang.launch_server", "--model-path", tiny_model, "--device", DEVICE),
        *("--load-format", "dummy", "--tiered-kv"),
        env=env,
    )
    assert ended.returncode == 2, ended.stderr
    assert "Traceback" not in ended.stderr
    last = ended.stderr.strip().splitlines()[-1]
    assert last.startswith("error: --tiered-kv cannot be used because loading sglang-tiered-kv ")
    assert said in last


@pytest.mark.slow
def test_a_server_without_it_has_stock_arguments(
    run_python: Run, broken: tuple[dict[str, str], str]
) -> None:
    env, _ = broken
    code = (
        "from sglang.srt.plugins import load_plugins\nload_plugins()\n"
        "from sglang.srt.server_args import ServerArgs\n"
        "print(ServerArgs.__module__, hasattr(ServerArgs, 'tiered_kv'))"
    )
    ended = run_python("-c", code, env=env)
    assert ended.stdout.split() == ["sglang.srt.server_args", "False"], ended.stderr
    assert "Traceback" not in ended.stderr


def test_what_is_whole_is_prepared_registered_and_active(
    run_python: Run, installed: Path, tmp_path: Path
) -> None:
    """The same three functions reach what they stand for."""
    code = f"""
import os, sys
for name in ("HOME", "USER", "LOGNAME"):
    os.environ.pop(name, None)
import pwd
def unknown(uid):
    raise KeyError(uid)
pwd.getpwuid = unknown
import torch
print(os.environ["USER"] == str(os.getuid()))
import {MODULE} as entry_points
print(entry_points.__file__.startswith({str(installed)!r}))
from sglang.srt.plugins import load_plugins
load_plugins()
import sglang.srt.server_args as server_args
print(server_args.ServerArgs.__module__)
from tiered_kv.plugin.start import platform
print(entry_points.activate_platform() == platform.activate())
os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
print(entry_points.activate_platform())
"""
    env = {**environment(installed), "TMPDIR": str(tmp_path), "SGLANG_PLUGINS": "tiered_kv"}
    ended = run_python("-c", code, "--tiered-kv", env=env)
    said = ["True", "True", "tiered_kv.plugin.start.server_args", "True", "None"]
    assert ended.stdout.split() == said, ended.stderr
