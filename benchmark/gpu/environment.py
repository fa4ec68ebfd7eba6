"""What the machine is, and what its device reaches without any of our code: the peaks."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmark.gpu.record import Record
from benchmark.gpu.setting import Setting
from benchmark.gpu.timing import median_s
from tiered_kv.tiers.memory_limits import available_bytes

PACKAGES = (
    "torch", "triton", "sglang", "sglang-kernel", "flashinfer-python", "flashinfer-jit-cache",
    "transformers", "numpy", "sglang-tiered-kv",
)  # fmt: skip
QUERY = "name,driver_version,pcie.link.gen.max,pcie.link.width.max,power.limit"
#: Transfers per second and lane, by generation; the encoding takes 2 of 130 bits.
PCIE_TRANSFERS = {3: 8e9, 4: 16e9, 5: 32e9, 6: 64e9}


def measure(setting: Setting, notes: Record) -> dict[str, Any]:
    """Versions and hardware; FLOP/s of a matrix product, bytes/s of copies within the device."""
    facts: dict[str, Any] = {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "free_bytes": available_bytes(),
        "packages": {name: version(name) for name in PACKAGES},
        "nvcc": nvcc_version(),
        "device": device_facts(setting),
    }
    notes.so_far(facts)
    return {**facts, "peaks": peaks(setting)}


def version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def output_of(*command: str) -> str | None:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def nvcc_version() -> str | None:
    text = output_of("nvcc", "--version")
    return text.splitlines()[-1] if text else None


def device_facts(setting: Setting) -> dict[str, Any]:
    if not setting.on_gpu:
        return {"name": cpu_name(), "kind": "cpu"}
    properties = torch.cuda.get_device_properties(setting.device)
    text = output_of("nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader")
    names = QUERY.split(",")
    smi = dict(zip(names, text.splitlines()[0].split(", "), strict=False)) if text else {}
    return {
        "name": properties.name,
        "kind": "cuda",
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "nvidia_smi": smi,
        "pcie_peak_bytes_s": pcie_peak_bytes_s(smi),
        "cuda": torch.version.cuda,
    }


def pcie_peak_bytes_s(smi: Mapping[str, str]) -> float | None:
    """One way, what no copy can exceed; None if nvidia-smi doesn't say."""
    try:
        generation, lanes = (int(smi[f"pcie.link.{name}.max"]) for name in ("gen", "width"))
        return PCIE_TRANSFERS[generation] * lanes / 8 * 128 / 130
    except (KeyError, ValueError):
        return None


def peaks(setting: Setting) -> dict[str, float]:
    """FLOP/s and bytes/s (read and written counted) as plain torch reaches them."""
    device = setting.device
    side = 256 if setting.is_small else 8192
    dtype = torch.bfloat16 if setting.on_gpu else torch.float32
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product_s = median_s(lambda: a @ b, device, setting.repeats)
    n_bytes = 1 << 22 if setting.is_small else 4 << 30
    source = torch.empty(n_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_s = median_s(lambda: target.copy_(source), device, setting.repeats)
    empty = torch.empty(1, device=device)
    launch_s = median_s(lambda: empty.fill_(0), device, setting.repeats)
    return {
        "matmul_flops": 2 * side**3 / product_s,
        "matmul_side": side,
        "device_copy_bytes_s": 2 * n_bytes / copy_s,
        "launch_and_wait_s": launch_s,
    }
