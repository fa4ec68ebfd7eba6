"""Values of the `--tiered-kv-*` options: what is accepted, and what it means.

The command line, a YAML file (`--config`) and `sgl.Engine(...)` all pass through here, so a size
may arrive as text or as a number, and YAML turns an unquoted `off` or `none` into something else.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import os
import shutil
import threading
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from tiered_kv.api.class_table import parse_classes, with_default
from tiered_kv.api.fields import TermsError
from tiered_kv.api.slo import DEFAULT_CLASSES, SloClasses
from tiered_kv.core.config import (
    DISK_BYTES_DEFAULT,
    DISK_IO_MODES,
    PAGE_FORMATS,
    SAME_FORMAT,
    STORE_WRITES,
)
from tiered_kv.core.errors import ConfigError
from tiered_kv.core.paths import expand_user
from tiered_kv.core.registry import Registry
from tiered_kv.core.units import parse_bytes
from tiered_kv.plugin.upstream import user
from tiered_kv.scheduler.request_policy import request_policies

NO_DISK = "none"
"""The value of `--tiered-kv-disk-dir` that switches the disk tier off."""

UPSTREAM_POLICY = "upstream"
"""The value of `--tiered-kv-policy` that leaves the waiting queue to SGLang's own policies."""

T = TypeVar("T")

DISK_BYTES_MIN = 256 * 10**6
DISK_FREE_SHARE_MAX = 0.8
_DISK_TIMEOUT_S = 5.0


def argument(check: Callable[[str, str], T]) -> Callable[[str], T]:
    """`check(option, value)` as an argparse `type`: what it refuses with ConfigError, that refuses.

    Argparse names the option itself, so `check` is told "the value".
    """

    def parse(text: str) -> T:
        try:
            return check("the value", text)
        except ConfigError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse


def named_in(registry: Registry[Any]) -> Callable[[str], str]:
    """As an argparse `type`: a name that is registered."""

    def check(_option: str, text: str) -> str:
        registry.get(text)
        return text

    return argument(check)


def size_bytes(option: str, value: str | int | float) -> int:
    """Bytes of `value`: a bare number is gigabytes (10^9), as in SGLang's `--hicache-size`.

    `option` is the flag's name, for the message. Raises ConfigError unless the size is positive.
    """
    try:
        gigabytes = float(value)
    except (TypeError, ValueError):
        gigabytes = None
    try:
        if isinstance(value, bool) or (gigabytes is not None and not math.isfinite(gigabytes)):
            raise ConfigError("")
        n_bytes = parse_bytes(value) if gigabytes is None else int(gigabytes * 1e9)
        if n_bytes <= 0:
            raise ConfigError("")
    except ConfigError:
        raise ConfigError(
            f"{option} must be a positive size, not {value!r}; write a number of gigabytes (8) "
            "or a number with a unit (512MB, 8GB, 8GiB)."
        ) from None
    return n_bytes


def number(option: str, value: str | float) -> float:
    """`value` as a float. Raises ConfigError if it is none."""
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ConfigError(f"{option} must be a number, not {value!r}.") from None


def integer(option: str, value: str | int) -> int:
    """`value` as an int. Raises ConfigError if it is none."""
    as_float = number(option, value)
    if not as_float.is_integer():
        raise ConfigError(f"{option} must be a whole number, not {value!r}.")
    return int(as_float)


def disk_io_mode(option: str, value: str | None) -> str:
    """How the disk tier reads and writes: auto, direct or buffered.

    Raises ConfigError for anything else.
    """
    return _one_of(option, value, DISK_IO_MODES)


def host_format(option: str, value: str | None) -> str:
    """What the host tier keeps pages in, raw by default. Raises ConfigError."""
    return _one_of(option, value, PAGE_FORMATS)


def disk_format(option: str, value: str | None) -> str:
    """What the disk tier keeps pages in, the same as the host by default. Raises ConfigError."""
    return _one_of(option, value, (SAME_FORMAT, *PAGE_FORMATS))


def store_writes(option: str, value: str | None) -> str:
    """What is written to the shared store: by value, all or none. Raises ConfigError.

    YAML turns an unquoted `none` into None in some dialects, so None is that.
    """
    return STORE_WRITES[-1] if value is None else _one_of(option, value, STORE_WRITES)


def _one_of(option: str, value: str | None, known: tuple[str, ...]) -> str:
    """`value`, or the first of `known` for None."""
    name = known[0] if value is None else str(value).strip().lower()
    if name not in known:
        raise ConfigError(f"{option} must be one of {', '.join(known)}, not {value!r}.")
    return name


def request_policy(option: str, value: str) -> str:
    """Who orders the waiting queue: a policy of ours, or "upstream". Raises ConfigError."""
    known = [UPSTREAM_POLICY, *request_policies.names()]
    if value not in known:
        raise ConfigError(f"{option} must be one of {', '.join(known)}, not {value!r}.")
    return value


def key_file(option: str, value: str | os.PathLike[str] | None) -> Path | None:
    """A key file, an absolute path. Raises ConfigError if there is no such file."""
    if value is None or not str(value).strip():
        return None
    path = expand_user(option, value).absolute()
    if not path.is_file():
        raise ConfigError(
            f"{option} names {path}, which is no file; write a key with "
            f"`(umask 077; openssl rand -hex 32 > {path})`."
        )
    return path


def disk_directory(option: str, value: str | os.PathLike[str] | None) -> Path | None:
    """The disk tier's absolute directory: `value`, the default for None, or None for "none".

    Raises ConfigError if the path leads through a file. What else may be wrong with it, such as a
    mount that is read-only, is no reason not to start.
    """
    if value is None:
        directory = _cache_home(option) / "tiered_kv" / "disk"
    elif str(value).strip().lower() in (NO_DISK, ""):
        return None
    else:
        directory = expand_user(option, value)
    directory = directory.absolute()
    in_the_way = _ask_disk(lambda: _file_in_the_way(directory), None)
    if in_the_way is not None:
        raise ConfigError(
            f"{option} cannot be {directory} because {in_the_way} is a file; name a directory, "
            f"or write {NO_DISK} to do without the disk tier."
        )
    return directory


def _cache_home(option: str) -> Path:
    """Where this user keeps caches. Raises ConfigError for a user without a home."""
    configured = os.environ.get("XDG_CACHE_HOME")
    if configured:
        return expand_user(option, configured)
    try:
        if not user.has_temporary_home():
            return Path.home() / ".cache"
    except RuntimeError:
        pass
    raise ConfigError(
        f"{option} has no default because this user has no home; name a directory, or write "
        f"{NO_DISK} to do without the disk tier."
    )


def slo_table(option: str, value: str | os.PathLike[str]) -> str:
    """The table of classes that `value` names, as one line of JSON: what every process can read.

    `value` is a file, in TOML if it is called `.toml` and in JSON otherwise, or such a line itself.
    Raises ConfigError.
    """
    text = str(value).strip()
    try:
        if text.startswith("{"):
            table = json.loads(text)
        else:
            content = expand_user(option, text).read_text()
            table = tomllib.loads(content) if text.endswith(".toml") else json.loads(content)
        parse_classes(table)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise ConfigError(f"{option} cannot be read from {text}: {reason}; name a file.") from None
    except (json.JSONDecodeError, tomllib.TOMLDecodeError) as error:
        kind = "TOML" if isinstance(error, tomllib.TOMLDecodeError) else "JSON"
        raise ConfigError(f"{option} cannot be {text}: it is no {kind} ({error}).") from None
    except TermsError as error:
        raise ConfigError(f"{option} cannot be {text}: {error}") from None
    return json.dumps(table)


@functools.lru_cache(maxsize=8)
def slo_classes(option: str, table: str | None, default: str | None) -> SloClasses:
    """The classes of a line that `slo_table` returned, or the built-in ones for None.

    `default` is the value of `option`: a class, "none", or None for "standard". Raises ConfigError.
    """
    classes = DEFAULT_CLASSES.classes if table is None else parse_classes(json.loads(table))
    try:
        return with_default(classes, default)
    except TermsError as error:
        raise ConfigError(f"{option} must name a class, but {error}") from None


def default_disk_bytes(directory: Path) -> int:
    """The disk tier's size if none is given: 32 GB, but at most 80% of what it could have.

    What it could have is the file system's free space plus what the files of its shards take
    already, those included that a start deletes: without that the tier would shrink at every
    restart. At least 256 MB: a file system that is full now may not be so later.
    """

    def usable() -> int:
        free = shutil.disk_usage(_nearest_existing(directory)).free
        return free + _own_bytes(directory)

    most = int(DISK_FREE_SHARE_MAX * _ask_disk(usable, DISK_BYTES_DEFAULT / DISK_FREE_SHARE_MAX))
    return min(DISK_BYTES_DEFAULT, max(DISK_BYTES_MIN, most))


def _ask_disk(question: Callable[[], T], otherwise: T) -> T:
    """What `question` returns; `otherwise` if a disk fails it, or does not answer for 5 s."""
    answers: list[T] = []

    def ask() -> None:
        with contextlib.suppress(OSError):
            answers.append(question())

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(_DISK_TIMEOUT_S)
    return answers[0] if answers else otherwise


def _own_bytes(directory: Path) -> int:
    # Without the flag nobody loads the tiers.
    from tiered_kv.tiers.disk.shards import bytes_below, list_shards

    shards = list_shards(directory) if directory.is_dir() else []
    return sum(bytes_below(shard.path) for shard in shards)


def _file_in_the_way(directory: Path) -> Path | None:
    existing = _nearest_existing(directory)
    return None if existing.is_dir() else existing


def _nearest_existing(path: Path) -> Path:
    """Of the path and those above it the first that is there, as far as one may look."""
    while path != path.parent:
        with contextlib.suppress(OSError):
            if path.exists():
                break
        path = path.parent
    return path
