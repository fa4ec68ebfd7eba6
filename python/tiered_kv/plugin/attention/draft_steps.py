"""Attention of a model that drafts on a CPU: each step of a chain sees what the steps before said.

SGLang drafts with a list of backends, one for each step after the first token, and has none of
`torch_native` (`sglang/srt/speculative/draft_utils.py`).
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from tiered_kv.plugin.attention.cpu import CpuAttentionBackend


class DraftStepBackend(CpuAttentionBackend):
    """Decodes `ahead` tokens behind the lengths of its pass, which do not grow with the steps."""

    def __init__(self, model_runner: Any, ahead: int) -> None:
        super().__init__(model_runner)
        self._ahead = ahead

    def _run_sdpa_forward_decode(
        self,
        query: torch.Tensor,
        output: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        req_to_token: torch.Tensor,
        req_pool_indices: torch.Tensor,
        seq_lens: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        seq_lens = seq_lens + self._ahead
        return super()._run_sdpa_forward_decode(
            query,
            output,
            k_cache,
            v_cache,
            req_to_token,
            req_pool_indices,
            seq_lens,
            *args,
            **kwargs,
        )


class DraftSteps:
    """The backends of all steps; chains alone."""

    def __init__(self, model_runner: Any, breadth: int, n_steps: int) -> None:
        if breadth > 1:
            raise ValueError(
                f"--speculative-eagle-topk {breadth} cannot be drafted on this CPU; give 1."
            )
        self.attn_backends = [DraftStepBackend(model_runner, ahead) for ahead in range(1, n_steps)]

    def init_forward_metadata(self, forward_batch: Any) -> None:
        for backend in self.attn_backends:
            backend.init_forward_metadata(forward_batch)


def register() -> None:
    """Have SGLang draft with these backends where the model that drafts has `torch_native`."""
    from sglang.srt.speculative.draft_utils import DraftBackendFactory

    decode, extend = (
        DraftBackendFactory.create_decode_backend,
        DraftBackendFactory.create_draft_extend_backend,
    )
    if hasattr(decode, "__wrapped__"):
        return

    def is_ours(factory: Any) -> bool:
        return type(factory.draft_model_runner.attn_backend) is CpuAttentionBackend

    @functools.wraps(decode)
    def create_decode_backend(factory: Any) -> Any:
        n_steps = factory.speculative_num_steps
        if n_steps <= 1 or not is_ours(factory):
            return decode(factory)
        return DraftSteps(factory.draft_model_runner, factory.topk, n_steps)

    @functools.wraps(extend)
    def create_draft_extend_backend(factory: Any) -> Any:
        # None: the draft's own backend does it.
        return None if is_ours(factory) else extend(factory)

    DraftBackendFactory.create_decode_backend = create_decode_backend
    DraftBackendFactory.create_draft_extend_backend = create_draft_extend_backend
