"""The CPU platform is chosen where a CPU is all there is and all that is asked for, only there."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from pkgutil import resolve_name
from types import SimpleNamespace

import pytest
import torch

from tiered_kv.plugin.upstream import platform as platform_adapter
from tiered_kv.plugin.upstream.platform import TieredKVCpuPlatform, activate, requested_device

CLASS_NAME = "tiered_kv.plugin.upstream.platform.TieredKVCpuPlatform"


@pytest.fixture
def cpu_only(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine without an accelerator, and a command line that asks for nothing."""
    for name in platform_adapter._ACCELERATOR_BACKENDS:
        if hasattr(torch, name):
            monkeypatch.setattr(getattr(torch, name), "is_available", lambda: False)
    monkeypatch.setattr(platform_adapter, "_ACCELERATOR_PACKAGES", ())
    monkeypatch.setattr(sys, "argv", ["launch_server"])
    monkeypatch.delenv("SGLANG_USE_CPU_ENGINE", raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    "arguments", [[], ["--device", "cpu"], ["--device=cpu"], ["--device", "cpu:0"], ["--port", "1"]]
)
def test_chosen_on_a_machine_with_only_a_cpu(
    cpu_only: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    cpu_only.setattr(sys, "argv", ["launch_server", *arguments])
    assert activate() == CLASS_NAME
    assert resolve_name(CLASS_NAME) is TieredKVCpuPlatform


@pytest.mark.parametrize("arguments", [["--device", "cuda"], ["--device=npu"]])
def test_not_chosen_when_another_device_is_asked_for(
    cpu_only: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    cpu_only.setattr(sys, "argv", ["launch_server", *arguments])
    assert activate() is None


def test_not_chosen_beside_upstreams_cpu_engine(cpu_only: pytest.MonkeyPatch) -> None:
    cpu_only.setenv("SGLANG_USE_CPU_ENGINE", "1")
    assert activate() is None
    cpu_only.setenv("SGLANG_USE_CPU_ENGINE", "0")
    assert activate() == CLASS_NAME


@pytest.mark.parametrize("backend", ["cuda", "xpu", "mps"])
@pytest.mark.parametrize("arguments", [[], ["--device", "cpu"]])
def test_not_chosen_beside_an_accelerator_torch_knows(
    cpu_only: pytest.MonkeyPatch, backend: str, arguments: list[str]
) -> None:
    cpu_only.setattr(sys, "argv", ["launch_server", *arguments])
    cpu_only.setattr(getattr(torch, backend), "is_available", lambda: True)
    assert activate() is None


@pytest.mark.parametrize("backend", ["npu", "hpu", "musa"])
def test_not_chosen_beside_an_accelerator_an_add_on_registered(
    cpu_only: pytest.MonkeyPatch, backend: str
) -> None:
    cpu_only.setattr(torch, backend, SimpleNamespace(is_available=lambda: True), raising=False)
    assert activate() is None


def test_not_chosen_beside_an_add_on_that_is_not_imported_yet(
    cpu_only: pytest.MonkeyPatch,
) -> None:
    cpu_only.setattr(platform_adapter, "_ACCELERATOR_PACKAGES", ("json",))
    assert activate() is None


@pytest.mark.parametrize(
    ("arguments", "device"),
    [
        ([], None),
        (["--device"], None),
        (["--device", "cuda:1"], "cuda"),
        (["--device", "cuda", "--device=cpu"], "cpu"),
        (["--devices", "cuda"], None),
    ],
)
def test_requested_device(arguments: list[str], device: str | None) -> None:
    assert requested_device(arguments) == device


def server_args(**given: object) -> SimpleNamespace:
    values: dict[str, object] = {
        "attention_backend": "intel_amx",  # what upstream puts there for a CPU
        "max_total_tokens": None,
        "mem_fraction_static": None,
        "grammar_backend": None,
        "tp_size": 1,
    }
    return SimpleNamespace(**(values | given))


def test_defaults_are_what_a_plain_cpu_can_do() -> None:
    args = server_args()
    TieredKVCpuPlatform().apply_server_args_defaults(args)
    assert args.attention_backend == "torch_native"
    assert args.grammar_backend == "llguidance"
    assert args.max_total_tokens == 65_536


@pytest.mark.parametrize(
    "given",
    [
        {"attention_backend": "flex_attention"},
        {"grammar_backend": "outlines"},
        {"max_total_tokens": 1000},
        {"mem_fraction_static": 0.5},
    ],
)
def test_what_the_user_gives_is_kept(given: dict[str, object]) -> None:
    args = server_args(**given)
    TieredKVCpuPlatform().apply_server_args_defaults(args)
    for name, value in given.items():
        assert getattr(args, name) == value
    if "mem_fraction_static" in given:
        assert args.max_total_tokens is None


def test_the_entry_point_names_it() -> None:
    (entry,) = entry_points(group="sglang.srt.platforms", name="tiered_kv_cpu")
    assert entry.load() is activate


RESOLVE = """
import sys
sys.argv = sys.argv[:1] + sys.argv[2:]
from sglang.srt.platforms import current_platform
print(type(current_platform).__name__)
"""


def platform_in_a_fresh_process(*arguments: str, **env: str) -> str:
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RESOLVE, "-", *arguments],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip().splitlines()[-1]


@pytest.mark.slow
@pytest.mark.skipif(platform_adapter.has_accelerator(), reason="needs a machine without one")
def test_upstream_resolves_it() -> None:
    assert platform_in_a_fresh_process() == "TieredKVCpuPlatform"


@pytest.mark.slow
@pytest.mark.skipif(platform_adapter.has_accelerator(), reason="needs a machine without one")
def test_upstream_resolves_its_own_cpu_engine_when_that_is_asked_for() -> None:
    assert platform_in_a_fresh_process(SGLANG_USE_CPU_ENGINE="1") == "CpuSRTPlatform"


RANKS = ("SGLANG_NCCL_SO_PATH", "SGLANG_CPU_OMP_THREADS_BIND")


def test_ranks_get_cores_of_their_own_and_no_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in RANKS:
        monkeypatch.setenv(name, "")  # restored at the end
        monkeypatch.delenv(name)
    TieredKVCpuPlatform().apply_server_args_defaults(server_args())
    assert not [name for name in RANKS if name in os.environ]

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 5, 7})
    TieredKVCpuPlatform().apply_server_args_defaults(server_args(tp_size=2))
    assert os.environ["SGLANG_CPU_OMP_THREADS_BIND"] == "0,1|2,5"
    assert not Path(os.environ["SGLANG_NCCL_SO_PATH"]).exists()

    monkeypatch.setenv("SGLANG_CPU_OMP_THREADS_BIND", "7|5")
    TieredKVCpuPlatform().apply_server_args_defaults(server_args(tp_size=2))
    assert os.environ["SGLANG_CPU_OMP_THREADS_BIND"] == "7|5"


def test_more_ranks_than_cores_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 4})
    assert platform_adapter.cores_by_rank(4) == "3|4|3|4"
