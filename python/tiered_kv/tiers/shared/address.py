"""What `--tiered-kv-store` may name: an engine, where it is, and how to use it."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from tiered_kv.core.errors import ConfigError
from tiered_kv.core.units import parse_bytes, parse_seconds

VALKEY, MOONCAKE, HICACHE = "valkey", "mooncake", "hicache"
PASSWORD_VARIABLE = "TIERED_KV_STORE_PASSWORD"

_SCHEMES = {
    "valkey": VALKEY,
    "valkeys": VALKEY,
    "redis": VALKEY,
    "rediss": VALKEY,
    "mooncake": MOONCAKE,
}
_PORTS = {VALKEY: 6379, MOONCAKE: 50051}
#: The module that each engine's client is, and what installs it.
_CLIENTS = {
    VALKEY: ("valkey", "pip install 'sglang-tiered-kv[valkey]'"),
    MOONCAKE: ("mooncake", "pip install 'sglang-tiered-kv[mooncake]'"),
}

HOW = (
    "write mooncake://MASTER:PORT, valkey://HOST:PORT (redis:// too), or hicache:BACKEND{...} with "
    "JSON for one of SGLang's storage backends"
)


@dataclass(frozen=True, slots=True)
class StoreAddress:
    """Where a shared store is. Values of `parameters` are parsed: bytes, seconds, numbers, text."""

    engine: str
    text: str
    """As it was written."""
    host: str = ""
    port: int = 0
    user: str | None = None
    database: int = 0
    is_encrypted: bool = False
    """Whether the way there is (TLS)."""
    backend: str = ""
    """SGLang's name of it, for `hicache:`."""
    parameters: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """For the log."""
        if self.engine == HICACHE:
            return f"hicache:{self.backend}"
        return f"{self.engine}://{self.host}:{self.port}"


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise ConfigError(f"{text!r} is no whole number of at least 1.")
    return int(text)


def _duration(text: str) -> float:
    seconds = parse_seconds(text)
    if seconds <= 0:
        raise ConfigError("It must be more than nothing.")
    return seconds


def _readable(text: str) -> str:
    try:
        Path(text).open("rb").close()
    except OSError as error:
        raise ConfigError(f"{text!r} cannot be read ({error.strerror}).") from None
    return text


_COMMON: dict[str, Callable[[str], Any]] = {"timeout": _duration, "drain": parse_seconds}
_PARAMETERS: dict[str, dict[str, Callable[[str], Any]]] = {
    VALKEY: _COMMON | {"ttl": _duration, "ca": _readable},
    MOONCAKE: _COMMON
    | {
        "replicas": _count,
        "soft_pin": _duration,
        "protocol": str,
        "device": str,
        "hostname": str,
        "metadata": str,
        "segment": parse_bytes,
    },
}


def parse_address(option: str, text: str) -> StoreAddress:
    """Raises ConfigError: no such engine, no address, a parameter that it does not have."""
    text = str(text).strip()
    if text.lower().startswith(f"{HICACHE}:"):
        return _hicache(option, text)
    try:
        url = urlsplit(text)
        port = url.port
    except ValueError as error:
        raise ConfigError(f"{option} cannot be {text!r} ({error}); {HOW}.") from None
    engine = _SCHEMES.get(url.scheme)
    if engine is None or not url.hostname:
        raise ConfigError(f"{option} cannot be {text!r}; {HOW}.")
    if url.password is not None:
        raise ConfigError(
            f"{option} must not hold a password, since options are logged; put it into the "
            f"environment variable {PASSWORD_VARIABLE}."
        )
    is_encrypted = url.scheme in ("valkeys", "rediss")
    parameters = _parameters(option, url.query, engine)
    if "ca" in parameters and not is_encrypted:
        raise ConfigError(f"{option} has the parameter ca, which is of TLS: write valkeys://.")
    return StoreAddress(
        engine,
        text,
        url.hostname,
        port or _PORTS[engine],
        url.username or None,
        _database(option, url.path, engine),
        is_encrypted,
        parameters=parameters,
    )


def _database(option: str, path: str, engine: str) -> int:
    number = path.strip("/")
    if number and (engine != VALKEY or not number.isdigit()):
        raise ConfigError(
            f"{option} cannot end with the path {path!r}; leave it out, or for Valkey name a "
            "database by its number."
        )
    return int(number or 0)


def _parameters(option: str, query: str, engine: str) -> dict[str, Any]:
    known, values = _PARAMETERS[engine], {}
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name not in known:
            raise ConfigError(
                f"{option} has no parameter {name!r} for {engine}; it knows {', '.join(known)}."
            )
        try:
            values[name] = known[name](value)
        except ConfigError as error:
            raise ConfigError(f"{option} has a wrong parameter {name}: {error}") from None
    return values


def _hicache(option: str, text: str) -> StoreAddress:
    rest = text.split(":", 1)[1]
    backend, brace, extra = rest.partition("{")
    try:
        config = json.loads(brace + extra) if brace else {}
    except json.JSONDecodeError as error:
        raise ConfigError(f"{option} ends with what is no JSON ({error}); {HOW}.") from None
    if not backend.strip():
        raise ConfigError(f"{option} names no backend; {HOW}.")
    parameters: dict[str, Any] = {"extra_config": config}
    for name, parse in _COMMON.items():
        # Ours, and not the backend's.
        if f"tiered_kv_{name}" in config:
            parameters[name] = parse(str(config.pop(f"tiered_kv_{name}")))
    return StoreAddress(HICACHE, text, backend=backend.strip(), parameters=parameters)


def check_client(option: str, address: StoreAddress) -> None:
    """Raises ConfigError if the engine's client library is not installed."""
    module, install = _CLIENTS.get(address.engine, ("", ""))
    if module and importlib.util.find_spec(module) is None:
        raise ConfigError(
            f"{option} {address.name} needs the Python package {module}, which is not installed: "
            f"{install}."
        )
