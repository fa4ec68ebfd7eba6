"""The exceptions of this project; `str(error)` is one sentence written for the user."""

from __future__ import annotations


class TieredKVError(Exception):
    """Base of every error this project raises on purpose."""


class ConfigError(TieredKVError, ValueError):
    """An option has a value that cannot work."""


class DiskTierError(TieredKVError):
    """The disk tier is used in a way that cannot work: in use by another, not ours, wrong key."""


class DiskStateError(DiskTierError):
    """The disk tier is used rightly, but its disk does not let it: full, damaged, read-only.

    That may change, and keeps no server from starting.
    """


class UpstreamError(TieredKVError):
    """The installed SGLang is not the version, or lacks a symbol, that this project needs."""


class IntegrityError(TieredKVError, AssertionError):
    """A caller broke a rule of the forest, or the forest's own bookkeeping is inconsistent."""
