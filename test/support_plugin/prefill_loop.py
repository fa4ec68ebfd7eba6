"""SGLang's loop of a prefill server, with senders that send nothing and are ready when told."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.disaggregation import prefill
from sglang.srt.disaggregation.base import KVPoll
from sglang.srt.disaggregation.base.conn import KVTransferMetric
from sglang.srt.disaggregation.utils import DisaggregationMode
from sglang.srt.managers.schedule_batch import Req

from support_plugin.decode_loop import DecodeLoop


class Sender:
    """In the place of a transfer backend's; `sent` is how many pages each call sent."""

    def __init__(self) -> None:
        self.state = KVPoll.WaitingForInput
        self.n_pages = 0
        self.sent: list[int] = []
        self.is_aborted = False

    def poll(self) -> Any:
        if self.is_aborted:
            return KVPoll.Failed
        if self.n_pages and sum(self.sent) == self.n_pages:
            return KVPoll.Success
        return self.state

    def init(self, n_pages: int, index: int) -> None:
        self.n_pages = n_pages

    def pop_decode_prefix_len(self) -> int:
        return 0

    def should_send_kv_chunk(self, n_pages: int, last_chunk: bool) -> bool:
        return n_pages > 0

    def send(self, pages: Any, state: Any, **more: Any) -> None:
        self.sent.append(len(pages))
        assert sum(self.sent) <= self.n_pages, "more than the decode server has room for"

    def abort(self) -> None:
        self.is_aborted = True

    def clear(self) -> None:
        pass

    def failure_exception(self) -> None:
        raise RuntimeError("aborted")

    def get_transfer_metric(self) -> Any:
        return KVTransferMetric()


class _Over(Exception):  # noqa: N818 - no error: the way out of a loop that has none
    """The script has ended."""


class _Numbers:
    """Of metadata buffers."""

    def __init__(self, n: int) -> None:
        self._free = list(range(n))

    def available_size(self) -> int:
        return len(self._free)

    def alloc(self) -> int:
        return self._free.pop()

    def free(self, index: int) -> None:
        assert index not in self._free
        self._free.append(index)


class _BootstrapQueue(prefill.PrefillBootstrapQueue):
    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.queue: list[Req] = []
        self.pp_size = 1
        self.req_to_metadata_buffer_idx_allocator = scheduler.req_to_metadata_buffer_idx_allocator
        self.kv_manager = SimpleNamespace(kv_args=SimpleNamespace(state_types=()))

    def create_sender(self, req: Req, num_kv_heads: int) -> bool:
        assert not hasattr(req, "made"), "a sender is made once"
        req.made = True
        req.disagg_kv_sender = Sender()
        req.sampling_params.max_new_tokens = 1
        req.pending_bootstrap = True
        return True


class PrefillLoop(DecodeLoop):
    """Requests end when their KV was sent: their only token is the first."""

    n_metadata = 32

    def __init__(self, args: Any, patch: pytest.MonkeyPatch, **options: Any) -> None:
        super().__init__(args, **options)
        self.disaggregation_mode = DisaggregationMode.PREFILL
        self.enable_staging = False
        self.model_config.num_key_value_heads = 1
        self.attn_cp_cpu_group = self.attn_tp_cpu_group = None
        self.req_to_metadata_buffer_idx_allocator = _Numbers(self.n_metadata)
        self.disagg_metadata_buffers = SimpleNamespace(set_buf=lambda req: None)
        self.disagg_prefill_bootstrap_queue = _BootstrapQueue(self)
        self.disagg_prefill_inflight_queue: list[Req] = []
        self.disagg_prefill_pending_chunk_rids: set[str] = set()
        self.output_streamer = SimpleNamespace(stream_output=self._stream)
        self.metrics_reporter.enable_metrics = False
        patch.setattr(
            prefill,
            "poll_and_all_reduce_attn_cp_tp_group",
            lambda senders, *groups: [sender.poll() for sender in senders],
        )
        patch.setenv("SGLANG_DISAGG_PREFILL_EARLY_SEND_CACHED_PREFIX", "0")

    def turn(self) -> None:
        """SGLang's loop, which has no end."""
        if self.enable_overlap:
            self.event_loop_overlap_disagg_prefill()
        else:
            self.event_loop_normal_disagg_prefill()

    def event_loop_overlap(self) -> None:
        with contextlib.suppress(_Over):
            self.turn()

    event_loop_normal = event_loop_overlap

    def _receive(self, local_reqs: list[Any] | None = None) -> list[Any]:
        received = super()._receive(local_reqs)
        if self.gracefully_exit:
            raise _Over
        return received

    @property
    def is_at_rest(self) -> bool:
        queues = self.disagg_prefill_bootstrap_queue.queue, self.disagg_prefill_inflight_queue
        return super().is_at_rest and not any(queues)

    def check_nothing_is_held(self) -> None:
        super().check_nothing_is_held()
        free = self.req_to_metadata_buffer_idx_allocator.available_size()
        assert free == self.n_metadata
