"""On PYTHONPATH, this breaks a part of a server on purpose, in every process that it starts.

Python imports a module of this name at its start. TIERED_KV_TEST_INJECT names what is to be broken,
separated by commas: modules beside this one, with TARGET, the module to be changed, and
`inject(module)`, which is called once TARGET has been executed.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import os
import sys
from importlib.machinery import ModuleSpec
from typing import Any


class InjectingFinder(importlib.abc.MetaPathFinder):
    def __init__(self, injection: Any) -> None:
        self._injection = injection

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name != self._injection.TARGET:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            self._injection.inject(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


for name in filter(None, os.environ.get("TIERED_KV_TEST_INJECT", "").split(",")):
    sys.meta_path.insert(0, InjectingFinder(importlib.import_module(name)))
