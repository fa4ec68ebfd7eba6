"""Paths as users write them."""

from __future__ import annotations

import os
from pathlib import Path

from tiered_kv.core.errors import ConfigError


def expand_user(option: str, text: str | os.PathLike[str]) -> Path:
    """`text` with a leading `~` replaced by the home that it stands for.

    Raises ConfigError where that is not known, as in a container whose user is only a number.
    `option` is what the error calls the path.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise ConfigError(
            f"{option} cannot be {text} because that home is not known here; write the whole path."
        ) from None
