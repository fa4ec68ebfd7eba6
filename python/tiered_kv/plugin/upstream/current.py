"""The adapter of the release that is installed: what differs between releases, under one name.

Each release has a folder with the same modules, and in them the same functions with the same
parameters (a test compares them):

- `symbols`: the table of all that is used of it
- `arguments`: its `ServerArgs` as ours, and what it made of them
- `request_kv`: where a request's KV is, and how it is kept or given back
- `cache_contract`: the class that its scheduler talks to
- `targets`: hooks that are attached elsewhere, or nowhere
- `hardware`: what its CPU platform and its attention are asked

Whoever needs one imports it from here. On a release that is not supported it is the adapter of the
last one before; who needs more than the CPU platform asks `installed.verify_version` first.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from tiered_kv.plugin.upstream.installed import folder_of_installed

if TYPE_CHECKING:
    from tiered_kv.plugin.upstream.v0_5_17 import (
        arguments,
        cache_contract,
        hardware,
        request_kv,
        symbols,
        targets,
    )
else:

    def __getattr__(name: str) -> ModuleType:
        # One by one: SGLang asks for the platform while half of its own modules are loaded.
        if name not in __all__:
            raise AttributeError(name)
        return importlib.import_module(f"{__package__}.{folder_of_installed()}.{name}")


__all__ = ["arguments", "cache_contract", "hardware", "request_kv", "symbols", "targets"]
