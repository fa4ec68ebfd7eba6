"""The engine's pool of recurrent states, and the place on the host for checkpoints of them."""

from __future__ import annotations

import logging

import numpy as np
import numpy.typing as npt
import torch
from sglang.srt.mem_cache.memory_pool import HybridLinearKVPool, HybridReqToTokenPool, MambaPool

from tiered_kv.core.errors import ConfigError
from tiered_kv.forest.key import namespace_hash
from tiered_kv.tiers.disk.tier import DiskTier
from tiered_kv.tiers.host_memory import map_private
from tiered_kv.tiers.layer_gate import LayerGate
from tiered_kv.tiers.pinned_memory import register_for_dma
from tiered_kv.tiers.recurrent import STATES_SHARE, RecurrentStates
from tiered_kv.tiers.state_store import StateLayout, StateStore
from tiered_kv.tiers.transfer import Collective

logger = logging.getLogger(__name__)

#: Fewer checkpoints than this are no cache.
STATES_MIN = 4


class FullLayersGate:
    """Layers wait by their number in the model; loads count those with attention."""

    def __init__(self, gate: LayerGate, pool: HybridLinearKVPool) -> None:
        self._gate = gate
        self._place = pool.full_attention_layer_id_mapping
        self._start = pool.start_layer

    def wait_until(self, layer: int) -> None:
        self._gate.wait_until(self._place[layer + self._start])


def state_tensors(pool: MambaPool) -> list[torch.Tensor]:
    """What a state consists of, each (layers, slots, ...), wide types first; not what is empty."""
    cache = pool.mamba_cache
    tensors = [tensor for tensor in (cache.temporal, *cache.conv) if tensor.numel()]
    return sorted(tensors, key=lambda tensor: -tensor.element_size())


class StatePoolCopier:
    """Between a slot of SGLang's MambaPool and memory: the tensors of the slot, one by one."""

    def __init__(self, pool: MambaPool) -> None:
        self._tensors = state_tensors(pool)
        self._bytes = [t[:, 0].numel() * t.element_size() for t in self._tensors]
        self.n_bytes = sum(self._bytes)

    def save(self, device_slot: int, memory: npt.NDArray[np.uint8]) -> None:
        for tensor, part in self._parts(device_slot, memory):
            part.copy_(tensor)

    def restore(self, memory: npt.NDArray[np.uint8], device_slot: int) -> None:
        for tensor, part in self._parts(device_slot, memory):
            tensor.copy_(part)

    def _parts(
        self, device_slot: int, memory: npt.NDArray[np.uint8]
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        whole, at, parts = torch.from_numpy(memory), 0, []
        for tensor, n_bytes in zip(self._tensors, self._bytes, strict=True):
            own = tensor[:, device_slot]
            parts.append((own, whole[at : at + n_bytes].view(own.dtype).view(own.shape)))
            at += n_bytes
        return parts


def described(pool: MambaPool) -> str:
    """What a state is, for names: types, shapes and layers."""
    parts = [f"{t.dtype} {(t.shape[0], *t.shape[2:])}" for t in state_tensors(pool)]
    return f"{' '.join(parts)} layers {pool.mamba_layer_ids}"


def open_states(
    pool: HybridReqToTokenPool,
    n_bytes: int,
    page_size: int,
    disk: DiskTier | None,
    collective: Collective,
    *,
    pins: bool,
) -> RecurrentStates:
    """A place for checkpoints in `n_bytes` of host memory, and on `disk` if that is not None.

    pins: whether a GPU is to reach it. Every rank must make the call. Raises ConfigError if only a
    few fit, and DiskTierError.
    """
    copier = StatePoolCopier(pool.mamba_pool)
    layout = StateLayout(copier.n_bytes)
    (n_slots,) = collective.minimum([n_bytes // layout.slot_bytes])
    if n_slots < STATES_MIN:
        least = int(STATES_MIN * layout.slot_bytes / STATES_SHARE) + 1
        raise ConfigError(
            f"the host tier has room for {n_slots} checkpoints of this model's recurrent state, "
            f"of {layout.slot_bytes} bytes each, and needs room for {STATES_MIN}: they get a "
            f"quarter of it; raise --tiered-kv-host-size to {least} bytes or more"
        )
    memory = map_private(n_slots * layout.slot_bytes)
    if pins:
        register_for_dma(memory.ctypes.data, memory.nbytes)
    store = None
    if disk is not None:
        # A page's name says with which weights; this one says what is kept under it.
        name = namespace_hash("recurrent state", described(pool.mamba_pool))
        pages = disk.namespace(name, layout.part_bytes, "checkpoints of recurrent state")
        store = StateStore(pages, layout)
    logger.info(
        "Tiered KV: checkpoints of recurrent state take %.1f KiB each; the host has room for %d.",
        layout.n_bytes / 1024,
        n_slots,
    )
    slots = memory.reshape(n_slots, layout.slot_bytes)
    return RecurrentStates(copier, layout, slots, store, page_size, collective)
