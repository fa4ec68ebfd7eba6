"""The CPU platform is chosen where a CPU is all there is and all that is asked for, only there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from pkgutil import resolve_name
from types import SimpleNamespace

import pytest
import torch

from support_plugin import on_release
from tiered_kv.plugin.start import platform as platform_adapter
from tiered_kv.plugin.start.platform import TieredKVCpuPlatform, activate, requested_device
from tiered_kv.plugin.upstream.current import arguments

CLASS_NAME = "tiered_kv.plugin.start.platform.TieredKVCpuPlatform"


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


@pytest.fixture(autouse=True)
def models_of_the_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each release has a way of its own to the model; here the arguments have it."""
    monkeypatch.setattr(arguments, "model_config", lambda args: args.get_model_config())


def model_like(
    dtype: torch.dtype, quantization: str | None = None, architecture: str = "LlamaForCausalLM"
) -> SimpleNamespace:
    config = SimpleNamespace(architectures=[architecture])
    return SimpleNamespace(dtype=dtype, quantization=quantization, hf_config=config)


def server_args(**given: object) -> SimpleNamespace:
    values: dict[str, object] = {
        "attention_backend": "intel_amx",  # what upstream puts there for a CPU
        "max_total_tokens": None,
        "mem_fraction_static": None,
        "grammar_backend": None,
        "tp_size": 1,
        "dp_size": 1,
        "pp_size": 1,
        "dtype": "auto",
        "moe_runner_backend": "auto",
        "get_model_config": lambda: model_like(torch.bfloat16),
    }
    return SimpleNamespace(**(values | given))


def test_defaults_are_what_a_plain_cpu_can_do(monkeypatch: pytest.MonkeyPatch) -> None:
    sent_ahead = "SGLANG_DISAGG_PREFILL_EARLY_SEND_CACHED_PREFIX"
    monkeypatch.delenv(sent_ahead, raising=False)
    args = server_args()
    TieredKVCpuPlatform().apply_server_args_defaults(args)
    assert args.attention_backend == "torch_native"
    assert args.grammar_backend == "llguidance"
    assert args.disable_hybrid_swa_memory
    assert args.max_total_tokens == 65_536
    assert os.environ[sent_ahead] == "0"


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


# As torch names them: an old server, Zen 4, Sapphire Rapids, and two ARM cores.
CPUS: dict[str, tuple[str, ...]] = {
    "skylake": ("avx2", "avx512_f", "avx512_vnni"),
    "zen4": ("avx2", "avx512_f", "avx512_bf16"),
    "sapphire rapids": ("avx512_f", "avx512_bf16", "avx512_fp16", "amx_bf16"),
    "graviton2": ("neon", "fp16_arith", "dot"),
    "graviton3": ("neon", "fp16_arith", "bf16", "sve"),
}


def cpu_is(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    known = {unit for units in CPUS.values() for unit in units}
    capabilities = {unit: unit in CPUS[name] for unit in known}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)


@pytest.mark.parametrize(
    ("cpu", "model_dtype", "expected"),
    [
        ("skylake", torch.bfloat16, "float32"),
        ("skylake", torch.float16, "float32"),
        ("skylake", torch.float32, "auto"),
        ("zen4", torch.bfloat16, "auto"),
        ("zen4", torch.float16, "float32"),
        ("sapphire rapids", torch.bfloat16, "auto"),
        ("sapphire rapids", torch.float16, "auto"),
        ("graviton2", torch.bfloat16, "float32"),
        ("graviton2", torch.float16, "auto"),
        ("graviton3", torch.bfloat16, "auto"),
    ],
)
def test_a_type_that_the_cpu_has_no_units_for_is_not_chosen(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    cpu: str,
    model_dtype: torch.dtype,
    expected: str,
) -> None:
    cpu_is(monkeypatch, cpu)
    model = model_like(model_dtype)
    args = server_args(get_model_config=lambda: model)
    TieredKVCpuPlatform().apply_server_args_defaults(args)
    assert args.dtype == expected
    # What upstream has already read of the model says the same.
    assert model.dtype == (torch.float32 if expected == "float32" else model_dtype)
    said = [record.getMessage() for record in caplog.records if "--dtype" in record.getMessage()]
    assert len(said) == (1 if expected == "float32" else 0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "half", "float32"])
def test_a_type_that_the_user_names_is_kept(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    cpu_is(monkeypatch, "skylake")
    args = server_args(dtype=dtype)
    TieredKVCpuPlatform().apply_server_args_defaults(args)
    assert args.dtype == dtype


def test_quantised_weights_keep_the_type_of_their_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu_is(monkeypatch, "skylake")
    model = model_like(torch.float16, "awq")
    args = server_args(get_model_config=lambda: model)
    TieredKVCpuPlatform().apply_server_args_defaults(args)
    assert args.dtype == "auto"


@pytest.mark.parametrize(
    ("architecture", "attention", "experts"),
    [
        ("GptOssForCausalLM", "triton", "triton"),
        ("Exaone4ForCausalLM", "triton", "auto"),
        ("Qwen3MoeForCausalLM", "torch_native", "auto"),
    ],
)
def test_models_that_sglang_has_no_plain_way_for(
    architecture: str, attention: str, experts: str
) -> None:
    model = model_like(torch.float32, architecture=architecture)
    args = server_args(get_model_config=lambda: model)
    TieredKVCpuPlatform().apply_server_args_defaults(args)
    assert (args.attention_backend, args.moe_runner_backend) == (attention, experts)
    given = {"attention_backend": "flex_attention", "moe_runner_backend": "triton_kernel"}
    args = server_args(get_model_config=lambda: model, **given)
    TieredKVCpuPlatform().apply_server_args_defaults(args)
    assert {name: getattr(args, name) for name in given} == given


RESOLVE_DTYPE = """
import json
import sys

import torch

units = []
torch.cpu.get_capabilities = lambda: dict.fromkeys(units, True)
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.plugins import load_plugins

load_plugins()
from sglang.srt.server_args import prepare_server_args
from tiered_kv.plugin.upstream.current import arguments

for units, *flags in json.loads(sys.argv[2]):
    args = prepare_server_args(["--model-path", sys.argv[1], "--device", "cpu", *flags])
    getattr(args, "resolve_once", lambda: None)()  # as the engine does on 0.5.23
    dtypes = arguments.model_config(args).dtype, ModelConfig.from_server_args(args).dtype
    print("found:", arguments.resolved(args).dtype, *dtypes)
"""


def test_sglang_takes_the_type_from_here(tmp_path: Path) -> None:
    """All of it but the CPU is real; with and without --tiered-kv."""
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64,
        "intermediate_size": 128, "num_attention_heads": 2, "num_hidden_layers": 1,
        "num_key_value_heads": 2, "vocab_size": 128, "dtype": "bfloat16",
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    tiered_kv = ["--tiered-kv", "--tiered-kv-disk-dir", "none"]
    cases = [
        [["avx2"]],
        [["avx2"], "--dtype", "bfloat16", *tiered_kv],
        [["avx2", "amx_bf16"], *tiered_kv],
    ]
    result = subprocess.run(
        [sys.executable, "-c", RESOLVE_DTYPE, str(tmp_path), json.dumps(cases)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert [line for line in result.stdout.splitlines() if line.startswith("found: ")] == [
        "found: float32 torch.float32 torch.float32",
        "found: bfloat16 torch.bfloat16 torch.bfloat16",
        "found: auto torch.bfloat16 torch.bfloat16",
    ]
    assert result.stderr.count("runs in float32") == 1


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

    monkeypatch.delenv("SGLANG_CPU_OMP_THREADS_BIND")
    TieredKVCpuPlatform().apply_server_args_defaults(server_args(tp_size=2, dp_size=2))
    shares = "0,1|2,5" if on_release.IS_0_5_17 else "0|1|2|5"
    assert os.environ["SGLANG_CPU_OMP_THREADS_BIND"] == shares

    # Stages of 0.5.17 share cores, as its replicas do.
    monkeypatch.delenv("SGLANG_CPU_OMP_THREADS_BIND")
    monkeypatch.delenv("SGLANG_NCCL_SO_PATH")
    TieredKVCpuPlatform().apply_server_args_defaults(server_args(pp_size=2))
    shares = None if on_release.IS_0_5_17 else "0,1|2,5"
    assert os.environ.get("SGLANG_CPU_OMP_THREADS_BIND") == shares
    assert not Path(os.environ["SGLANG_NCCL_SO_PATH"]).exists()

    monkeypatch.setenv("SGLANG_CPU_OMP_THREADS_BIND", "7|5")
    TieredKVCpuPlatform().apply_server_args_defaults(server_args(tp_size=2))
    assert os.environ["SGLANG_CPU_OMP_THREADS_BIND"] == "7|5"


def test_more_ranks_than_cores_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 4})
    assert platform_adapter.cores_by_rank(4) == "3|4|3|4"
