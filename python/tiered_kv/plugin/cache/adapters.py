"""Names of LoRA adapters: by their contents, so that only KV computed with those is ever reused.

SGLang's `lora_id` is made of a name and a path, or is random: an adapter that was trained again
keeps the first, and one that is loaded again loses the second. So an adapter is named by its
contents when it is loaded, and a request takes that name along in its `TreeKey` instead of the id.
"""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from tiered_kv.forest.key import SHARED_TREE, TreeKey, namespace_hash
from tiered_kv.plugin.requests.salts import parts_of, salted
from tiered_kv.plugin.upstream.current import request_kv
from tiered_kv.tiers.transfer import Collective

logger = logging.getLogger(__name__)

#: Of adapter_config.json, what says whence an adapter comes or what it is for. All else counts.
SAYS_NOTHING = frozenset(
    {
        *("base_model_name_or_path", "revision", "auto_mapping", "peft_version"),
        *("inference_mode", "task_type"),
    }
)
_NAME_BYTES = 32
_WORD_BYTES = 4


class AdapterNames:
    """The names of the adapters that this rank has loaded, by SGLang's id.

    manager: SGLang's LoRAManager, or None without LoRA. Every rank must make the same calls in the
    same order.
    """

    def __init__(self, manager: Any, collective: Collective) -> None:
        self._manager = manager
        self._collective = collective
        self._keys: dict[str, TreeKey] = {}
        for lora_id in () if manager is None else manager.loras:
            self.changed(lora_id)

    def changed(self, lora_id: str) -> None:
        """What goes by this id was loaded, or unloaded, or one of the two has failed."""
        self._keys.pop(lora_id, None)
        adapter = self._manager.loras.get(lora_id)
        name = None if adapter is None else self._readable_name(lora_id, adapter)
        # Were each rank to name what it has read, some would find KV that others lack.
        is_agreed = self._is_agreed(name)
        if adapter is not None:
            name = name if is_agreed else None
            self._keys[lora_id] = _unnamed() if name is None else TreeKey(adapter=name)

    def _readable_name(self, lora_id: str, adapter: Any) -> bytes | None:
        try:
            return name_of(adapter, self._manager)
        except Exception as error:  # whatever a new kind of tensor may raise
            logger.warning(
                "Tiered KV: KV of LoRA adapter %s stays above the disk, because its contents "
                "cannot be read (%s: %s).",
                lora_id,
                type(error).__name__,
                error,
            )
            return None

    def _is_agreed(self, name: bytes | None) -> bool:
        data = name or bytes(_NAME_BYTES)
        words = [
            int.from_bytes(data[at : at + _WORD_BYTES], "little")
            for at in range(0, _NAME_BYTES, _WORD_BYTES)
        ]
        agreed = self._collective.minimum([*words, *(-word for word in words)])
        return all(
            low == -high
            for low, high in zip(agreed[: len(words)], agreed[len(words) :], strict=True)
        )

    def key_of(self, lora_id: str) -> TreeKey:
        """The tree of requests with this adapter that name neither a salt nor a key."""
        return self._keys.get(lora_id) or _unnamed()


def _unnamed() -> TreeKey:
    """A tree that ends with the process, at the latest."""
    return TreeKey(adapter=secrets.token_bytes(_NAME_BYTES), is_lasting=False)


def name_of(adapter: Any, manager: Any) -> bytes:
    """32 bytes over all of SGLang's `LoRAAdapter` that decides what it computes.

    Cryptographic, since adapters may come from tenants: nobody can make one that has the name of
    another. Weights that `manager` does not apply, as their module was not chosen at the start, do
    not count. Raises whatever reading the weights raises.
    """
    config = {k: v for k, v in adapter.config.hf_config.items() if k not in SAYS_NOTHING}
    for field in ("target_modules", "modules_to_save"):  # PEFT writes sets
        if isinstance(config.get(field), list):
            config[field] = sorted(config[field])
    parts: list[str | bytes] = [
        json.dumps(config, sort_keys=True, default=str),
        json.dumps(adapter.config.added_tokens_config, sort_keys=True),
        f"{adapter.scaling} {manager.experts_shared_outer_loras}",
    ]
    weights = _weights(adapter, manager.target_modules)
    for name, weight in sorted(weights, key=lambda item: item[0]):
        flat = weight.detach().contiguous().reshape(-1).view(torch.uint8)
        contents = hashlib.sha256(flat.numpy()).digest()
        parts += [f"{name}|{tuple(weight.shape)}|{weight.dtype}", contents]
    return namespace_hash("adapter", *parts)


def _weights(adapter: Any, target_modules: set[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """As SGLang keeps them on the CPU, whole on every rank."""
    for weights in (*(layer.weights for layer in adapter.layers), adapter.embedding_layers):
        for name, weight in weights.items():
            if _is_applied(name, target_modules):
                yield name, weight
    yield from adapter.added_tokens_embeddings.items()


def _is_applied(name: str, target_modules: set[str]) -> bool:
    from sglang.srt.lora.utils import get_target_module_name

    try:
        get_target_module_name(name, target_modules)
    except ValueError:
        return False
    return True


# -- hooks ---------------------------------------------------------------------------------------

#: Those of this process's scheduler; None if its cache is not ours.
_names: AdapterNames | None = None


def track(names: AdapterNames) -> None:
    """From now on requests of this process get the keys of their trees from `names`."""
    global _names
    _names = names


def after_change(result: Any, scheduler: Any, recv_req: Any) -> None:
    """AFTER `Scheduler.load_lora_adapter`, `..._from_tensors` and `unload_lora_adapter`."""
    if _names is not None:
        _names.changed(recv_req.lora_id)


def name_tree(result: None, req: Any, *args: Any, **kwargs: Any) -> None:
    """AFTER `Req.__init__`: `extra_key` becomes the TreeKey of the request; None stays None."""
    apart = request_kv.separate_salt(req)
    if _names is None or isinstance(req.extra_key, TreeKey):
        return
    if req.extra_key is None and not apart:
        return
    # SGLang has appended the adapter's id.
    own = (req.extra_key or "").removesuffix(req.lora_id or "")
    req.extra_key = tree_key(own, req.lora_id, apart)


def tree_key(own: str | None, lora_id: str | None, apart: str | None = None) -> TreeKey | None:
    """The tree of a request that says `own` (`requests/salts.py`), with an adapter or without.

    apart: see `root_key`. None: the tree of those that name nothing.
    """
    if not (own or lora_id or apart):
        return None
    salt, extra_key = parts_of(own)
    adapter = SHARED_TREE
    if lora_id is not None:
        adapter = _unnamed() if _names is None else _names.key_of(lora_id)
    return replace(adapter, salt=salted(salt, apart), extra_key=extra_key, salt_text=apart)
