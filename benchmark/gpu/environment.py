"""What the machine is, and what its device reaches without any of our code: the peaks."""

from __future__ import annotations

import importlib.util
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch
from benchmark.gpu.setting import Setting
from benchmark.gpu.timing import median_s

PACKAGES = (
    "torch", "triton", "sglang", "sglang-kernel", "flashinfer-python", "flashinfer-jit-cache",
    "transformers", "sglang-tiered-kv",
)  # fmt: skip
QUERY = "name,driver_version,pcie.link.gen.current,pcie.link.width.current,power.limit"


def measure(setting: Setting) -> dict[str, Any]:
    """Versions and hardware; FLOP/s of a matrix product, bytes/s of copies within the device."""
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "packages": {name: version(name) for name in PACKAGES},
        "nvcc": importlib.util.find_spec("flashinfer") is not None and nvcc_version(),
        "device": device_facts(setting),
        "peaks": peaks(setting),
    }


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
    smi = output_of("nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader")
    return {
        "name": properties.name,
        "kind": "cuda",
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "nvidia_smi": dict(zip(QUERY.split(","), smi.split(", "), strict=False)) if smi else None,
        "cuda": torch.version.cuda,
    }


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
