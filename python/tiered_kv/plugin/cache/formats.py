"""In which bytes each tier keeps a page: what the options say, for the KV pool at hand."""

from __future__ import annotations

from dataclasses import dataclass

from sgl_kernel_ext.formats import Format, PageLayout, Role
from sgl_kernel_ext.ops import layout_of
from tiered_kv.core.config import TieredKVConfig
from tiered_kv.core.errors import ConfigError
from tiered_kv.plugin.cache.device_pool import DeviceBuffers
from tiered_kv.tiers.cold.local_pages import LocalPages
from tiered_kv.tiers.device import buffer_format
from tiered_kv.tiers.encoded_store import EncodedDisk, EncodedStore
from tiered_kv.tiers.page_format import PageFormat
from tiered_kv.tiers.page_store import PageStore


@dataclass(frozen=True, slots=True)
class TierFormats:
    """The pages of each tier. Layouts are None where every tier keeps the device's own bytes."""

    device: PageFormat
    host: PageFormat
    disk: PageFormat
    host_layout: PageLayout | None = None
    disk_layout: PageLayout | None = None
    n_threads: int = 1
    """How many threads convert pages on their way to the disk, and as many from it."""

    def on_disk(self, disk: LocalPages) -> LocalPages:
        """`disk` as the host sees it: its pages in the host's format."""
        if self.host_layout is None or self.disk_layout is None or self.disk == self.host:
            return disk
        return EncodedDisk(disk, self.host_layout, self.disk_layout, self.n_threads)

    def in_store(self, store: PageStore) -> PageStore:
        """`store`, which has pages in the disk's format, as the host sees it."""
        if self.host_layout is None or self.disk_layout is None or self.disk == self.host:
            return store
        return EncodedStore(store, self.host_layout, self.disk_layout, self.n_threads)


def tier_formats(config: TieredKVConfig, device: DeviceBuffers) -> TierFormats:
    """Raises ConfigError for a format that does not fit the pool, and for an unknown one."""
    own = buffer_format(config.page_size, device.layers, device.buffers)
    if config.host.page_format == config.disk_page_format == Format.RAW:
        return TierFormats(own, own, own)
    host = _layout("--tiered-kv-host-format", config.host.page_format, config, device)
    disk = _layout("--tiered-kv-disk-format", config.disk_page_format, config, device)
    # Where the forward pass runs on the same cores, they are its own.
    on_cpu = device.buffers[0].device.type == "cpu"
    return TierFormats(
        own,
        PageFormat.of_layout(host),
        PageFormat.of_layout(disk),
        host,
        disk,
        n_threads=1 if on_cpu else config.disk.io_threads,
    )


def _layout(option: str, name: str, config: TieredKVConfig, device: DeviceBuffers) -> PageLayout:
    roles = [Role.KEY if is_key else Role.VALUE for is_key in device.is_key]
    try:
        return layout_of(Format(name), config.page_size, device.buffers, device.layers, roles)
    except ValueError as error:
        raise ConfigError(f"{option} {name} cannot be used with this model: {error}.") from None
