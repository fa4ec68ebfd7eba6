"""How long, and how much, may be kept."""

from __future__ import annotations

import pytest

pytest.importorskip("sglang")

from tiered_kv.core.errors import ConfigError
from tiered_kv.plugin.options.control import ControlArgs


def resolved(seconds: object, share: object) -> None:
    args = ControlArgs()
    args.tiered_kv_keep_seconds, args.tiered_kv_keep_share = seconds, share  # type: ignore[assignment]
    args.resolve_control()


@pytest.mark.parametrize(("seconds", "share"), [(0, 1), (3600.0, 25.0), (604800, 90)])
def test_what_may_be(seconds: float, share: float) -> None:
    resolved(seconds, share)


@pytest.mark.parametrize("seconds", [-1, 604801, float("nan"), True, "60", None])
def test_seconds_that_cannot_be(seconds: object) -> None:
    with pytest.raises(ConfigError, match="--tiered-kv-keep-seconds must be"):
        resolved(seconds, 25.0)


@pytest.mark.parametrize("share", [0, -1, 91, float("inf"), False, "25"])
def test_shares_that_cannot_be(share: object) -> None:
    with pytest.raises(ConfigError, match="--tiered-kv-keep-share must be"):
        resolved(60.0, share)
