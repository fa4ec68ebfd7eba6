"""The store that servers share, as the options say."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

from tiered_kv.core.config import StoreConfig
from tiered_kv.core.errors import ConfigError
from tiered_kv.core.ids import Tier
from tiered_kv.plugin.options.store import KEY_VARIABLE
from tiered_kv.tiers.disk.encryption import KEY_BYTES, read_key_file
from tiered_kv.tiers.host import HostPool
from tiered_kv.tiers.kv_shard import KVShard
from tiered_kv.tiers.page_format import PageFormat
from tiered_kv.tiers.page_store import PageStore, StoreTraits
from tiered_kv.tiers.replicas import StoreOfAnother
from tiered_kv.tiers.shared.address import HICACHE, MOONCAKE, StoreAddress, parse_address
from tiered_kv.tiers.shared.blobs import Blobs
from tiered_kv.tiers.shared.envelope import HEADER_BYTES, StoreSecrets
from tiered_kv.tiers.shared.link import DEADLINE_S, StoreLink
from tiered_kv.tiers.shared.object_store import ObjectStore

logger = logging.getLogger(__name__)

#: How long a server that stops writes what it holds to the store, unless `drain` says otherwise.
DRAIN_S = 5.0


@dataclass(frozen=True, slots=True)
class SharedStore:
    """This rank's way to the store that servers share."""

    address: StoreAddress
    link: StoreLink | None
    """None on a rank for which another reads and writes it, too."""
    secrets: StoreSecrets

    @property
    def drain_s(self) -> float:
        """What writing to it may take when the server stops."""
        return float(self.address.parameters.get("drain", DRAIN_S))

    def pages(self, namespace: bytes, page_format: PageFormat) -> PageStore:
        """The pages of one namespace."""
        traits = StoreTraits(Tier.STORE, page_format, knows_locally=False, is_shared=True)
        if self.link is None:
            return StoreOfAnother(traits)
        return ObjectStore(self.link, namespace, traits, self.secrets)

    def close(self) -> None:
        if self.link is not None:
            self.link.close()


def open_store(
    config: StoreConfig, shard: KVShard, host: HostPool, page_bytes: int
) -> SharedStore | None:
    """None if no store was named; it is connected to when it is first needed.

    page_bytes: of the pages that go there.

    Raises ConfigError or DiskTierError: a key that cannot be read, a client that cannot be loaded.
    """
    if config.address is None:
        return None
    address = parse_address("--tiered-kv-store", config.address)
    secrets = StoreSecrets(_key(config), config.encrypts)
    if not shard.is_first:
        return SharedStore(address, None, secrets)
    deadline_s = float(address.parameters.get("timeout", DEADLINE_S))
    link = StoreLink(_client(address, deadline_s, host, page_bytes), deadline_s)
    protection = "encrypted" if secrets.encrypts else "keyed" if secrets.key else "not keyed"
    logger.info("Tiered KV: store %s, %s; to it goes: %s.", address.name, protection, config.writes)
    return SharedStore(address, link, secrets)


def _key(config: StoreConfig) -> bytes:
    if config.key_file is not None:
        return read_key_file(config.key_file)
    text = os.environ.get(KEY_VARIABLE, "").strip()
    try:
        key = bytes.fromhex(text)
    except ValueError:
        key = b"?"
    if text and len(key) != KEY_BYTES:
        raise ConfigError(
            f"The environment variable {KEY_VARIABLE} holds no key of {2 * KEY_BYTES} hexadecimal "
            "digits: make one with `openssl rand -hex 32`."
        )
    return key


def _client(address: StoreAddress, deadline_s: float, host: HostPool, page_bytes: int) -> Blobs:
    # Imported late: each has a library of its own, which nobody else needs.
    if address.engine == MOONCAKE:
        from tiered_kv.tiers.shared.mooncake import MooncakeBlobs

        return MooncakeBlobs(address, deadline_s, host.pages)
    if address.engine == HICACHE:
        from tiered_kv.plugin.cache.hicache import HiCacheBlobs

        return HiCacheBlobs(address, HEADER_BYTES + page_bytes)
    from tiered_kv.tiers.shared.valkey import ValkeyBlobs

    return ValkeyBlobs(address, deadline_s)
