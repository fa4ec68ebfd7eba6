"""Reaching a server as its administrator: what the command lines that do so have in common."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import urlsplit

from tiered_kv.core.errors import ConfigError


def url_of(text: str) -> str:
    """A server's address, as `--url` gave it, without the last slash. Raises ConfigError."""
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"--url must be like http://127.0.0.1:30000, not {text!r}.")
    return text.rstrip("/")


def text_of(option: str, path: Path) -> str:
    """What the file holds that `option` named. Raises ConfigError."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{option} {path} cannot be read: {error}.") from None


def key_of(option: str, key_file: Path | None, variable: str) -> str | None:
    """The key in the file that `option` named, else in the environment's `variable`; None: none.

    Not on the command line, which lists of processes show. Raises ConfigError.
    """
    if key_file is None:
        return os.environ.get(variable) or None
    key = text_of(option, key_file).strip()
    if not key or not key.isascii() or not key.isprintable():
        raise ConfigError(f"{option} {key_file} must hold one key and nothing else.")
    return key
