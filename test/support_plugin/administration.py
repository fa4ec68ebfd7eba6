"""What trainers and operators send to SGLang's scheduler, as its dispatcher hands it over."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.managers.io_struct import (
    ContinueGenerationReqInput,
    PauseGenerationReqInput,
    ReleaseMemoryOccupationReqInput,
    ResumeMemoryOccupationReqInput,
    UpdateWeightFromDiskReqInput,
)
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.managers.scheduler_components.weight_updater import SchedulerWeightUpdaterManager
from sglang.srt.managers.tp_worker import BaseTpWorker
from sglang.srt.utils.torch_memory_saver_adapter import TorchMemorySaverAdapter

from support_plugin import on_release
from support_plugin.decode_loop import DecodeLoop, PretendDisk
from support_plugin.decode_requests import Kind
from support_plugin.kv_model import KvModel
from tiered_kv.forest.key import namespace_hash
from tiered_kv.plugin.cache import weight_updates
from tiered_kv.plugin.upstream.current import hardware

PROMPT = Kind(family=2, seed=0, n_own=20, max_new_tokens=8, sampling={"ignore_eos": True})
OTHER = Kind(family=1, seed=1, n_own=14, max_new_tokens=8, sampling={"ignore_eos": True})
#: Of the 31 tokens of PROMPT: whole pages, and one token to be computed.
N_REUSABLE = 28


def ask(loop: DecodeLoop, kind: Kind, rid: str) -> Req:
    req = kind.request(rid)
    loop.serve(req)
    return req


def settle(loop: DecodeLoop) -> None:
    """Until nothing is on its way, the disk included."""
    loop.run(lambda: loop.tree_cache.hierarchy.progress.is_busy)
    loop.check_nothing_is_held()


def drop_from_device(loop: DecodeLoop) -> None:
    loop.tree_cache.hierarchy.evict_device(10_000)


class Runner:
    """A model runner that is its own updater of weights, as far as either is asked for."""

    def __init__(self, update: Any) -> None:
        self._update = update
        self.weight_updater = self

    def get_model_runner(self) -> Runner:
        return self

    def update_weights_from_disk(self, *args: Any, **kwargs: Any) -> tuple[bool, str]:
        if on_release.IS_0_5_17:  # the hook is on the worker
            return self._update(*args, **kwargs)  # type: ignore[no-any-return]
        return weight_updates.agree_on_outcome(
            lambda self, *args, **kwargs: self._update(*args, **kwargs), self, *args, **kwargs
        )


class Worker(BaseTpWorker):
    """SGLang's worker, whose model is the KV model: `model_path` says what becomes of an update."""

    def __init__(self, model: KvModel) -> None:
        self._model = model
        self._runner = Runner(self._update)

    @property
    def model_runner(self) -> Any:
        return self._runner

    def weight_update_runners(self) -> list[tuple[str, Any]]:
        return [("target", self._runner)]

    def forward_batch_generation(self, forward_batch: Any) -> None:
        raise NotImplementedError

    def _update(
        self, model_path: str, load_format: str, recapture_cuda_graph: bool
    ) -> tuple[bool, str]:
        if model_path == "not there":
            return False, "no such folder"
        if model_path != "the same":
            self._model.version += 1
        if model_path == "another shape":
            raise ValueError("a tensor of another shape")
        return model_path != "half of it", "loaded"


class Administrator:
    """Every call answers, whatever the scheduler is doing."""

    def __init__(self, loop: DecodeLoop) -> None:
        self._loop = loop
        worker = Worker(loop.tp_worker)
        weight_updates.track(loop.tree_cache, hardware.weights_of(worker))
        self._updater = SchedulerWeightUpdaterManager(
            tp_worker=worker,
            draft_worker=None,
            **on_release.of_weight_updater(),
            memory_saver_adapter=TorchMemorySaverAdapter.create(enable=False),
            flush_cache=loop.flush_cache,
            is_fully_idle=loop.is_fully_idle,
            scheduler=loop,
        )

    def update(self, model_path: str = "others", *, flush: bool = True) -> tuple[bool, str]:
        """model_path: others, the same; not there, half of it, another shape.

        If it asks for no flush, KV of the old weights may be read from then on.
        """
        model = self._loop.tp_worker
        before = model.version
        request = UpdateWeightFromDiskReqInput(
            model_path=model_path, flush_cache=flush, torch_empty_cache=False
        )
        output = self._updater.update_weights_from_disk(request)
        if model.version == before:
            return output.success, output.message
        model.versions = {model.version} if flush else model.versions | {model.version}
        return output.success, output.message

    def flush(self) -> bool:
        is_flushed = self._loop.flush_cache(empty_cache=False)
        if is_flushed:
            self._loop.tp_worker.versions = {self._loop.tp_worker.version}
        return bool(is_flushed)

    def pause(self, mode: str) -> None:
        self._loop.pause_generation(PauseGenerationReqInput(mode=mode))

    def go_on(self) -> None:
        self._loop.continue_generation(ContinueGenerationReqInput())

    def release_memory(self) -> bool:
        """Whether the memory of the KV cache is gone: what lies there then is overwritten."""
        with on_release.no_device_to_wait_for():
            self._updater.release_memory_occupation(
                ReleaseMemoryOccupationReqInput(tags=["kv_cache"])
            )
        if "kv_cache" not in self._updater.offload_tags:
            return False
        for buffer in self._loop.token_to_kv_pool_allocator.get_kvcache().get_kv_buffer(0):
            buffer.fill_(-7.0)
        return True

    def resume_memory(self) -> None:
        with on_release.no_device_to_wait_for():
            self._updater.resume_memory_occupation(
                ResumeMemoryOccupationReqInput(tags=["kv_cache"])
            )


def versions_on_disk(disk: PretendDisk) -> dict[int, set[float]]:
    """By the version of the weights that names pages: whose KV is in them."""
    names = {namespace_hash("the KV model", str(version)): version for version in range(1000)}
    found: dict[int, set[float]] = {}
    for (namespace, _), page in disk.store._pages.copy().items():  # others write meanwhile
        values = torch.frombuffer(bytearray(page), dtype=torch.float32).reshape(2, -1, 2)[1]
        found.setdefault(names[namespace], set()).update(values[:, 0].tolist())
    return found
