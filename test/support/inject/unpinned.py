"""Lets SGLang serve LoRA adapters without a GPU: there is no pinned memory without its driver."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

TARGET = "sglang.srt.lora.layers"


def inject(module: Any) -> None:
    torch = module.torch
    torch.Tensor.pin_memory = lambda self, *_args, **_kwargs: self
    for name in ("tensor", "empty", "zeros"):
        setattr(torch, name, _unpinned(getattr(torch, name)))


def _unpinned(make: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(make)
    def unpinned(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("pin_memory", None)
        return make(*args, **kwargs)

    return unpinned
