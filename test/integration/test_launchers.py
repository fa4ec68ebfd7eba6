"""Every way to start it, and the page sizes: `sgl.Engine`, `sglang serve`, page sizes 1, 16, 64."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.client import Answer, generate, generate_all
from harness.demo_model import host_size
from harness.metrics import wait_for_disk
from harness.prompts import PromptMaker
from harness.server import ALWAYS_LOAD, FLOAT32, SGLANG_SERVE, Server
from support.oracle import Oracle

pytestmark = [pytest.mark.server, pytest.mark.long, pytest.mark.timeout(600)]

#: "Story page 1" and the like.
N_SHARED = 6
ENGINE_PROGRAM = Path(__file__).parents[1] / "support" / "engine_program.py"


def test_engine_with_and_without_the_flag(
    demo_model: Path, oracle: Oracle, prompts: PromptMaker, tmp_path: Path
) -> None:
    """Without the flag it answers as where the plugin is not loaded at all, which the oracle is."""
    asked = [prompts.tokens(f"engine {i}", 300) for i in range(4)]
    stock = {
        "model_path": str(demo_model), "device": "cpu", "attention_backend": "torch_native",
        "dtype": "float32", "page_size": 16, "max_total_tokens": 1024, "chunked_prefill_size": 256,
        "skip_server_warmup": True, "max_running_requests": 16,
    }  # fmt: skip
    tiers = {
        "tiered_kv": True, "tiered_kv_load_policy": "always",
        "tiered_kv_disk_dir": str(tmp_path / "disk"), "tiered_kv_disk_size": "500MB",
        "tiered_kv_host_size": host_size(2048),
    }  # fmt: skip
    program = {"prompts": asked, "max_new_tokens": 8, "stock": stock, "tiered": stock | tiers}
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    ended = subprocess.run(
        [sys.executable, str(ENGINE_PROGRAM), str(tmp_path / "found")],
        input=json.dumps(program), env=environment, capture_output=True, text=True, timeout=500,
        check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-5000:]
    found = json.loads((tmp_path / "found").read_text())

    truths = oracle.all_output_ids([(prompt, 8) for prompt in asked])
    answers = {
        name: [Answer.of(body) for body in found[name]]
        for name in ("stock", "tiered", "again", "after_flush")
    }
    for name, given in answers.items():
        assert [answer.output_ids for answer in given] == truths, name
    of_tiers = ("tiered_kv.tiers", "tiered_kv.plugin.cache")
    assert not [name for name in found["loaded_without_flag"] if name.startswith(of_tiers)]
    assert [answer.cached_tokens for answer in answers["stock"]] == [0] * 4
    assert [a.cached_tokens for a in answers["again"]] == [288] * 4
    # Only as much of the first prompt was pushed out of the device as the others needed.
    assert answers["again"][0].host > 0
    assert found["flushed"]
    assert [answer.disk for answer in answers["after_flush"]] == [288] * 4


def use_all_tiers(server: Server, prompts: PromptMaker, oracle: Oracle, page_size: int) -> None:
    """The device has room for 1,024 tokens, the host for more.

    Prompts share their first few tokens; with small pages those may come from a nearer tier.
    """
    asked = [prompts.tokens(f"page {page_size} {i}", 300) for i in range(5)]
    truths = oracle.all_output_ids([(prompt, 8) for prompt in asked])
    n_reusable = 299 // page_size * page_size

    computed = generate_all(server, asked, concurrency=3)
    from_host = generate(server, asked[0])
    wait_for_disk(server)
    server.flush_cache()
    from_disk = generate_all(server, asked, concurrency=3)

    assert all(answer.cached_tokens <= N_SHARED for answer in computed)
    assert [a.cached_tokens for a in (from_host, *from_disk)] == [n_reusable] * 6
    assert from_host.host >= n_reusable - N_SHARED
    assert all(answer.disk >= n_reusable - N_SHARED for answer in from_disk)
    given = [answer.output_ids for answer in (*computed, from_host, *from_disk)]
    assert given == [*truths, truths[0], *truths]


def tiers(disk: Path) -> list[object]:
    return [
        *("--tiered-kv", *ALWAYS_LOAD, "--tiered-kv-host-size", host_size(4096)),
        *("--tiered-kv-disk-dir", disk, "--tiered-kv-disk-size", "500MB"),
        *("--max-total-tokens", 1024, "--enable-metrics", "--tiered-kv-debug-integrity"),
    ]


def test_sglang_serve_with_the_default_page_size(
    make_server: Callable[..., Server], oracle: Oracle, prompts: PromptMaker, tmp_path: Path
) -> None:
    with make_server(
        "sglang_serve", *FLOAT32, *tiers(tmp_path / "disk"), launcher=SGLANG_SERVE
    ) as server:
        use_all_tiers(server, prompts, oracle, page_size=64)
        assert server.get("/server_info").json()["page_size"] == 64


def test_page_size_1_without_overlap(
    make_server: Callable[..., Server], oracle: Oracle, prompts: PromptMaker, tmp_path: Path
) -> None:
    args = ["--page-size", 1, "--disable-overlap-schedule", "--chunked-prefill-size", 100]
    with make_server("page_size_1", *FLOAT32, *args, *tiers(tmp_path / "disk")) as server:
        use_all_tiers(server, prompts, oracle, page_size=1)
