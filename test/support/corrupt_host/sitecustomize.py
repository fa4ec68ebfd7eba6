"""On PYTHONPATH, this makes a server's host -> device copies deliver wrong bytes.

The negative control of the comparisons with plain SGLang: if pages that come back from the host
are wrong, they must fail. Python imports a module of this name in every process that it starts.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from typing import Any

TARGET = "tiered_kv.tiers.device"


class CorruptingFinder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name != TARGET:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            corrupt(module.CpuPageCopier)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def corrupt(copier: Any) -> None:
    to_device = copier.to_device

    def corrupted(self: Any, host_pages: Any, *rest: Any) -> None:
        # The sign bits of every fourth byte: a float32 keeps its size and changes its sign.
        self._host[host_pages, 3::4] ^= 0x80
        try:
            to_device(self, host_pages, *rest)
        finally:
            self._host[host_pages, 3::4] ^= 0x80

    copier.to_device = corrupted
    print("corrupt_host: host -> device copies deliver wrong bytes", flush=True)


sys.meta_path.insert(0, CorruptingFinder())
