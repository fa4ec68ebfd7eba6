"""The options of the store that servers share: which one, what goes there, and its secrets."""

from __future__ import annotations

import dataclasses
import os
from types import ModuleType

from sglang.srt.arg_groups.arg_utils import NS, A, Arg

from tiered_kv.core.config import STORE_WRITES, StoreConfig
from tiered_kv.core.errors import ConfigError
from tiered_kv.plugin.options import values

NO_STORE = "none"
"""The value of `--tiered-kv-store` that does without one."""

KEY_VARIABLE = "TIERED_KV_STORE_KEY"
"""Instead of a file, 64 hexadecimal digits."""


def _address(option: str, text: str) -> str:
    if text.strip().lower() == NO_STORE:
        return text
    addresses = _addresses()
    addresses.check_client(option, addresses.parse_address(option, text))
    return text


def _addresses() -> ModuleType:
    """Imported late: a server without the flag imports no tier."""
    from tiered_kv.tiers.shared import address

    return address


@dataclasses.dataclass(init=False, repr=False, eq=False, kw_only=True)
class StoreArgs:
    """Mixed into `ServerArgs`."""

    tiered_kv_store: A[
        str | None,
        Arg(
            no_cli=True,
            type_parser=values.argument(_address),
            help="A store that several servers share, below host memory and beside the disk: what "
            "one of them computed, the others read. mooncake://MASTER:PORT, "
            "valkey://HOST:PORT[/DB] (redis:// too; valkeys:// for TLS), or hicache:BACKEND{JSON} "
            "for a storage backend of SGLang's. After ? come parameters, as in "
            "valkey://kv:6379?ttl=12h&timeout=500ms; docs/cluster.md lists them. "
            "Servers find each other's pages if they serve the same "
            "weights with the same page size, type and tensor parallelism, and have the same key. "
            "Default: no store.",
        ),
        NS("memory"),
    ] = None
    tiered_kv_store_write: A[
        str,
        Arg(
            no_cli=True,
            type_parser=values.argument(values.store_writes),
            help="What is written to the store: 'value' (default) what was used twice or takes "
            "long to compute, and when the server stops what it holds; 'all' that is computed; "
            "'none' to read only.",
        ),
        NS("memory"),
    ] = STORE_WRITES[0]
    tiered_kv_store_key_file: A[
        str | None,
        Arg(
            no_cli=True,
            help="A key that all servers of the cluster have, and nobody else: 32 bytes or 64 "
            "hexadecimal digits, in a file that only its owner may read, or in the environment "
            f"variable {KEY_VARIABLE}. With it nobody who reaches the store can tell whether a "
            "prompt is there, or put a page in another's place. Default: no key.",
        ),
        NS("memory"),
    ] = None
    tiered_kv_store_encrypt: A[
        bool,
        Arg(
            no_cli=True,
            help="Encrypt pages with that key before they leave this server. All servers of the "
            "cluster must, or none.",
        ),
        NS("memory"),
    ] = False

    def store_config(self) -> StoreConfig:
        """Raises ConfigError."""
        option = "--tiered-kv-store"
        address = str(self.tiered_kv_store or "").strip()
        if address.lower() in ("", NO_STORE):
            for name in ("write", "key_file", "encrypt"):
                field = f"tiered_kv_store_{name}"
                if getattr(self, field) != type(self).__dataclass_fields__[field].default:
                    flag = "--" + field.replace("_", "-")
                    raise ConfigError(
                        f"{flag} has no effect without {option}; name a store: {_addresses().HOW}."
                    )
            return StoreConfig()
        _address(option, address)
        key_file = values.key_file("--tiered-kv-store-key-file", self.tiered_kv_store_key_file)
        if self.tiered_kv_store_encrypt and key_file is None and not os.environ.get(KEY_VARIABLE):
            raise ConfigError(
                "--tiered-kv-store-encrypt needs a key; give --tiered-kv-store-key-file FILE, or "
                f"the environment variable {KEY_VARIABLE}."
            )
        return StoreConfig(
            address=address,
            writes=values.store_writes("--tiered-kv-store-write", self.tiered_kv_store_write),
            key_file=key_file,
            encrypts=self.tiered_kv_store_encrypt,
        )
