"""How much of the machine's memory the host tier takes, as a pure function."""

from __future__ import annotations

from tiered_kv.core.errors import ConfigError

#: What the pools of all ranks leave to everything else, at least: nobody can reclaim pinned memory.
RESERVE_BYTES = 1 << 30
#: Of the memory that is free, what pools take whose size nobody has named.
FREE_SHARE = 0.8


def host_size(
    *,
    named_bytes: int | None,
    wished_bytes: int,
    least_bytes: int,
    free_bytes: int | None,
    n_ranks: int,
) -> int:
    """Bytes of one rank's pool, all ranks of the machine taking as much.

    named_bytes: what the user asked for, to the byte; that or nothing. wished_bytes: a multiple of
    the device's pool otherwise, as far as that is there; never less than least_bytes.
    free_bytes: before any rank has taken something; None if the system doesn't say.
    Raises ConfigError if what was named is not there.
    """
    if free_bytes is None:
        return named_bytes if named_bytes is not None else max(wished_bytes, least_bytes)
    spare = max(0, free_bytes - RESERVE_BYTES)
    if named_bytes is not None:
        if named_bytes > spare // n_ranks:
            raise ConfigError(
                f"the host tier wants {named_bytes / 1e9:.2f} GB per rank but only "
                f"{spare / n_ranks / 1e9:.2f} GB of memory are free; lower --tiered-kv-host-size, "
                "or leave it out for what there is room for."
            )
        return named_bytes
    there = min(int(FREE_SHARE * free_bytes), spare) // n_ranks
    return max(least_bytes, min(wished_bytes, there))
