"""Host memory that a GPU reads and writes by itself."""

from __future__ import annotations

import torch

from tiered_kv.core.errors import ConfigError
from tiered_kv.tiers import host_memory


def register_for_dma(address: int, n_bytes: int) -> None:
    """Pins memory near the current device. Raises ConfigError.

    In one piece: a copy must not cross from one registered piece to the next.
    """
    gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
    pci = f"{gpu.pci_domain_id:04x}:{gpu.pci_bus_id:02x}:{gpu.pci_device_id:02x}.0"
    try:
        host_memory.prepare(address, n_bytes, host_memory.numa_node_of(pci))
    except OSError as error:
        raise ConfigError(
            f"the host tier's {n_bytes / 1e9:.2f} GB are not there ({error}); lower "
            "--tiered-kv-host-size."
        ) from None
    status = torch.cuda.cudart().cudaHostRegister(address, n_bytes, 0)
    if int(status) != 0:
        raise ConfigError(
            f"the host tier's {n_bytes / 1e9:.2f} GB cannot be pinned (CUDA error {int(status)}); "
            "lower --tiered-kv-host-size or raise the limit on locked memory (ulimit -l)."
        )
