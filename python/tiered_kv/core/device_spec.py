"""What the cost model needs to know of an accelerator, and presets for common ones.

Peak figures are the vendors' data sheets' (dense, no sparsity). The two efficiencies, the host
link's bandwidth and the iteration floor are what software typically reaches; they are starting
points that calibration against a running server corrects.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

from tiered_kv.core.errors import ConfigError

TENSOR_PARALLEL_EFFICIENCY = 0.9
"""Part of its speed that a device keeps in a tensor-parallel group, the rest being all-reduces.

An assumption in the middle of what NVLink systems show; measure it where it matters.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSpec:
    """One accelerator, or a tensor-parallel group of them seen as one (`scaled`)."""

    name: str
    """Name under which it is looked up."""

    memory_bytes: int
    """Device memory, bytes."""

    flops: float
    """Peak dense matrix throughput in the serving data type (bf16 on GPUs), FLOP/s."""

    memory_bandwidth: float
    """Peak device memory bandwidth, bytes/s."""

    host_link_bandwidth: float
    """Bytes/s one way between host memory and the device, as large copies typically reach."""

    host_link_latency_s: float
    """Seconds before the first byte of such a copy arrives, launch included."""

    compute_efficiency: float
    """Part of `flops` that a long prefill reaches, in (0, 1]."""

    bandwidth_efficiency: float
    """Part of `memory_bandwidth` that decoding reaches, in (0, 1]."""

    iteration_floor_s: float
    """Fixed seconds of each forward pass: launches, sampling, the engine's own step."""

    source: str
    """Where the figures come from."""

    n_devices: int = 1
    """How many devices this is."""

    prefill_weight_reads: float = 0.0
    """How often a prefill's pass reads the weights before it computes with them. A CPU's matrix
    products pack them first; a GPU's read them while it computes."""

    decode_weight_reads: float = 0.0
    """How often a decode reads the weights again for each of its requests. A GPU's matrix products
    read them once for all rows of a batch; a CPU's do not get as far with a few rows."""

    decode_kv_reads: float = 1.0
    """How often a decode's attention reads the KV of a context, or how much slower it is than
    reading: query heads that share KV may each read it."""

    prefill_kv_reads: float = 1.0
    """The same of a prefill's attention to the tokens that were cached before it."""

    mixes_decodes: bool = True
    """Whether decodes in the pass of a prefill cost less than a pass of their own. Not where the
    kernels of prefills take them one by one."""

    is_mixing_measured: bool = False
    """Whether that was measured on such a device, and not only to be expected of its kernels: else
    a server mixes only where it is told to."""

    def __post_init__(self) -> None:
        for field in ("memory_bytes", "flops", "memory_bandwidth", "host_link_bandwidth"):
            value = getattr(self, field)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(
                    f"The device {self.name!r} needs a positive {field}, not {value}."
                )
        for field in ("compute_efficiency", "bandwidth_efficiency"):
            value = getattr(self, field)
            if not 0 < value <= 1:
                raise ConfigError(
                    f"The {field} of the device {self.name!r} must be in (0, 1], not {value}."
                )
        for field, least in (
            ("host_link_latency_s", 0),
            ("iteration_floor_s", 0),
            ("prefill_weight_reads", 0),
            ("decode_weight_reads", 0),
            ("decode_kv_reads", 1),
            ("prefill_kv_reads", 1),
        ):
            value = getattr(self, field)
            if not (math.isfinite(value) and value >= least):
                raise ConfigError(
                    f"The {field} of the device {self.name!r} must be at least {least}, not "
                    f"{value}."
                )

    def scaled(self, n: int) -> DeviceSpec:
        """A tensor-parallel group of `n` such devices, as one device.

        Memory, compute, memory bandwidth and host links (each device has its own) add up; both
        efficiencies fall by TENSOR_PARALLEL_EFFICIENCY; latency and floor stay. Raises ConfigError
        if `n` is below 1.
        """
        if n < 1:
            raise ConfigError(f"A tensor-parallel group needs at least 1 device, not {n}.")
        if n == 1:
            return self
        return replace(
            self,
            name=f"{n}x{self.name}",
            n_devices=self.n_devices * n,
            memory_bytes=self.memory_bytes * n,
            flops=self.flops * n,
            memory_bandwidth=self.memory_bandwidth * n,
            host_link_bandwidth=self.host_link_bandwidth * n,
            compute_efficiency=self.compute_efficiency * TENSOR_PARALLEL_EFFICIENCY,
            bandwidth_efficiency=self.bandwidth_efficiency * TENSOR_PARALLEL_EFFICIENCY,
        )


_PRESETS = (
    DeviceSpec(
        name="H100-80",
        memory_bytes=80_000_000_000,
        flops=989.4e12,
        memory_bandwidth=3.35e12,
        host_link_bandwidth=55e9,
        host_link_latency_s=10e-6,
        compute_efficiency=0.55,
        bandwidth_efficiency=0.8,
        iteration_floor_s=1e-3,
        source="NVIDIA H100 data sheet (SXM5); PCIe 5.0 x16; efficiencies and floor assumed",
    ),
    DeviceSpec(
        name="H200-141",
        memory_bytes=141_000_000_000,
        flops=989.4e12,
        memory_bandwidth=4.8e12,
        host_link_bandwidth=55e9,
        host_link_latency_s=10e-6,
        compute_efficiency=0.55,
        bandwidth_efficiency=0.8,
        iteration_floor_s=1e-3,
        source="NVIDIA H200 data sheet (SXM); PCIe 5.0 x16; efficiencies and floor assumed",
    ),
    DeviceSpec(
        name="L40S",
        memory_bytes=48_000_000_000,
        flops=362.05e12,
        memory_bandwidth=864e9,
        host_link_bandwidth=25e9,
        host_link_latency_s=10e-6,
        compute_efficiency=0.55,
        bandwidth_efficiency=0.8,
        iteration_floor_s=1e-3,
        source="NVIDIA L40S data sheet; PCIe 4.0 x16; efficiencies and floor assumed",
    ),
    DeviceSpec(
        name="A10",
        memory_bytes=24_000_000_000,
        flops=125e12,
        memory_bandwidth=600e9,
        host_link_bandwidth=25e9,
        host_link_latency_s=10e-6,
        compute_efficiency=0.55,
        bandwidth_efficiency=0.8,
        iteration_floor_s=1e-3,
        source="NVIDIA A10 data sheet; PCIe 4.0 x16; efficiencies and floor assumed",
    ),
    DeviceSpec(
        name="CPU-2",
        memory_bytes=16_000_000_000,
        flops=215e9,
        memory_bandwidth=12e9,
        host_link_bandwidth=5.7e9,
        host_link_latency_s=20e-6,
        compute_efficiency=0.65,
        bandwidth_efficiency=0.8,
        iteration_floor_s=40e-3,
        prefill_weight_reads=3.0,
        decode_weight_reads=0.5,
        decode_kv_reads=5.0,
        prefill_kv_reads=15.0,
        mixes_decodes=False,
        source="two cores of a 2.8 GHz Xeon with AVX-512, float32: the best of 10 torch matrix "
        "products (215 GFLOP/s), a matrix-vector product (11.8 GB/s read) and a copy (5.7 GB/s); "
        "efficiency, floor, packing and reads from SmolLM2-135M's passes: a decode 0.09 s, 0.03 s "
        "a request and 25 us a token of context, a prefill 0.22 s, 1.6 ms a token and 75 us a "
        "cached token",
    ),
)

DEVICES: dict[str, DeviceSpec] = {preset.name: preset for preset in _PRESETS}
"""The presets by name. CPU-2's figures are for float32, its usual serving type."""

_GROUP = re.compile(r"(\d+)x(.+)")
#: Words of the names that torch gives to devices, and the presets that are nearest.
_NEAREST = (
    *(("H200", "H200-141"), ("GH200", "H200-141"), ("H100", "H100-80")),
    *(("L40S", "L40S"), ("L40", "L40S"), ("A10", "A10"), ("A10G", "A10")),
)


def find_device(name: str) -> DeviceSpec:
    """The preset called `name`, in any case; "4xH100-80" is a tensor-parallel group of four.

    Raises ConfigError naming the known presets.
    """
    grouped = _GROUP.fullmatch(name.strip())
    n, base = (int(grouped[1]), grouped[2]) if grouped else (1, name.strip())
    for known, preset in DEVICES.items():
        if known.lower() == base.lower():
            return preset.scaled(n)
    raise ConfigError(
        f"There is no device preset {name!r}; the known ones are {', '.join(sorted(DEVICES))}, "
        "and for example 4xH100-80 for a tensor-parallel group of four."
    )


def preset_for(device_name: str) -> DeviceSpec | None:
    """The preset nearest to what torch calls `device_name`; None if none is near."""
    words = re.findall(r"\w+", device_name)
    return next((DEVICES[preset] for word, preset in _NEAREST if word in words), None)
