"""Every symbol of SGLang that the plugin uses, and the check that it is what we think it is."""

from __future__ import annotations

from tiered_kv.core.errors import UpstreamError

SUPPORTED = "0.5.17"

ADVICE = f"install sglang=={SUPPORTED} or start without --tiered-kv."


def verify_version() -> None:
    """Raise UpstreamError unless the installed SGLang is the supported release."""
    from sglang.version import __version__ as found

    if found.partition("+")[0] != SUPPORTED:
        raise UpstreamError(
            f"--tiered-kv supports SGLang {SUPPORTED}, but {found} is installed; {ADVICE}"
        )


def verify() -> None:
    """Raise UpstreamError unless every symbol we use is there and has the shape we know."""
    verify_version()
