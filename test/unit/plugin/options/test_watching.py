"""Who may look: what `--tiered-kv-view` means for a server, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang")

from tiered_kv.core.errors import ConfigError
from tiered_kv.plugin.options.watching import WatchingArgs, is_loopback, view_mode


def resolved(**fields: Any) -> Any:
    """`WatchingArgs.resolve_watching` on what it reads."""
    defaults = {
        "tiered_kv_view": "auto",
        "tiered_kv_view_text_tokens": 0,
        "host": "127.0.0.1",
        "admin_api_key": None,
    }
    args = SimpleNamespace(**{**defaults, **fields})
    WatchingArgs.resolve_watching(args)  # type: ignore[arg-type]
    return args


@pytest.mark.parametrize(
    ("fields", "mode"),
    [
        ({}, "on"),
        ({"host": "localhost"}, "on"),
        ({"host": "::1"}, "on"),
        ({"host": "0.0.0.0"}, "off"),
        ({"host": "10.0.0.5"}, "off"),
        ({"host": "gpu-host"}, "off"),
        ({"host": "0.0.0.0", "admin_api_key": "k"}, "on"),
        ({"host": "0.0.0.0", "tiered_kv_view": "on"}, "on"),
        ({"tiered_kv_view": "off"}, "off"),
        ({"tiered_kv_view": False}, "off"),
        ({"host": "0.0.0.0", "tiered_kv_view": True}, "on"),
    ],
)
def test_modes(fields: dict[str, Any], mode: str) -> None:
    assert resolved(**fields).tiered_kv_view == mode


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"tiered_kv_view": "yes"}, "must be one of auto, on, off, not 'yes'"),
        ({"tiered_kv_view_text_tokens": 8}, "needs an --admin-api-key"),
        ({"tiered_kv_view_text_tokens": -1, "admin_api_key": "k"}, "from 0 to 32, not -1"),
        ({"tiered_kv_view_text_tokens": 33, "admin_api_key": "k"}, "from 0 to 32, not 33"),
        (
            {"tiered_kv_view_text_tokens": 8, "admin_api_key": "k", "tiered_kv_view": "off"},
            "shows nothing with --tiered-kv-view off",
        ),
    ],
)
def test_refused(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        resolved(**fields)


def test_on_the_command_line_and_in_yaml() -> None:
    assert view_mode("--tiered-kv-view", " ON ") == "on"
    assert view_mode("--tiered-kv-view", None) == "auto"


def test_loopback() -> None:
    assert is_loopback("127.8.9.1")
    assert is_loopback("[::1]")
    assert not is_loopback("")
    assert not is_loopback("192.168.1.1")
