"""Which release of SGLang is installed, and whether it is one that the plugin was written for.

Releases are pinned because most of what we use is not public; another release means another table
of symbols, not a looser check.
"""

from __future__ import annotations

import re

from tiered_kv.core.errors import UpstreamError

#: Each with the folder of what is specific to it.
FOLDERS = {"0.5.17": "v0_5_17", "0.5.23": "v0_5_23"}
SUPPORTED = tuple(FOLDERS)

ADVICE = (
    f"install {' or '.join(f'sglang=={release}' for release in SUPPORTED)}, or start without "
    "--tiered-kv."
)


def installed() -> str:
    """The installed release, without what a local build adds to it."""
    from sglang.version import __version__

    release: str = __version__.partition("+")[0]
    return release


def verify_version() -> None:
    """Raise UpstreamError unless the installed SGLang is a supported release."""
    from sglang.version import __version__ as found

    if installed() not in SUPPORTED:
        raise UpstreamError(
            f"--tiered-kv supports SGLang {' and '.join(SUPPORTED)}, but {found} is installed; "
            f"{ADVICE}"
        )


def folder_of_installed() -> str:
    """The folder of the installed release; if that is not supported, of the last one before it.

    `--tiered-kv` is refused there (`verify_version`), but the CPU platform serves stock servers on
    it as well as it can.
    """
    before = [release for release in SUPPORTED if _order(release) <= _order(installed())]
    return FOLDERS[before[-1] if before else SUPPORTED[0]]


def _order(release: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", release)[:3])
