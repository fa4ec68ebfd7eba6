"""What torch and SGLang load of this project, in whatever state an installation is.

All entry points name this module. It is one file, needs nothing, and lies beside the metadata that
names it even where the project itself is a checkout (`force-include` in pyproject.toml). So an
environment in which `tiered_kv` cannot be imported - its checkout is gone or another user's, it is
half uninstalled, a dependency is broken - still imports torch and serves without the plugin, and
refuses `--tiered-kv` with one sentence: torch fails to import if an entry point does, and SGLang
shows a traceback and goes on. An installed copy may be older than what it calls: it changes seldom.
"""

from __future__ import annotations

import functools
import sys

FLAG = "--tiered-kv"


def prepare_user() -> None:
    """Group `torch.backends`, run as torch's import ends. No backend: the earliest moment."""
    try:
        from tiered_kv.plugin.upstream.user import prepare

        prepare()
    except Exception as error:
        # Whoever imports torch for something else need not know.
        if FLAG in sys.argv:
            _warn(_cause(error))


def register() -> None:
    """Group `sglang.srt.plugins`. Exits with code 2 if the plugin is wanted and not there."""
    try:
        from tiered_kv.plugin.start.entry import register as register_plugin
    except Exception as error:
        if FLAG in sys.argv:
            sys.stderr.write(f"error: {FLAG} cannot be used because {_cause(error)}\n")
            raise SystemExit(2) from None  # SGLang swallows whatever is an Exception
        return
    register_plugin()


def activate_platform() -> str | None:
    """Group `sglang.srt.platforms`: the CPU platform's class name, None where it is not wanted."""
    try:
        from tiered_kv.plugin.start.platform import activate

        return activate()
    except Exception as error:
        _warn(_cause(error))
        return None


def _cause(error: Exception) -> str:
    what = " ".join(str(error).split())
    return f"loading sglang-tiered-kv failed with {type(error).__name__}: {what}"


@functools.cache
def _warn(cause: str) -> None:
    """Once for the same cause."""
    sys.stderr.write(f"warning: {cause}\n")
