"""The gateway finds the workers' pods, with the flags of docker/kubernetes, and lets them go."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests

from harness.gateway import Gateway
from harness.kubernetes import container
from harness.stub_workers import StubWorker
from support.stub_kubernetes import StubKubernetes

CHAT = {"model": "demo", "messages": [{"role": "user", "content": "Hello"}]}


def flags(port: int) -> list[str]:
    """The manifest's, for pods that listen at that port. Nobody asks for a key here."""
    found = [a.replace("$(NAMESPACE)", "tiered-kv") for a in container_args()]
    found[found.index("--service-discovery-port") + 1] = str(port)
    key = found.index("--api-key")
    return found[:key] + found[key + 2 :]


def container_args() -> list[str]:
    args: list[str] = container("cpu", "Deployment", "gateway")["args"]
    return args


def seconds_until(condition: Callable[[], bool], timeout_s: float = 20) -> float:
    began = time.monotonic()
    while not condition():
        assert time.monotonic() < began + timeout_s
        time.sleep(0.1)
    return time.monotonic() - began


def test_a_pod_gets_requests_while_it_is_ready_and_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        StubKubernetes(tmp_path) as cluster,
        StubWorker("pod") as worker,
        ThreadPoolExecutor(1) as pool,
    ):
        monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig))
        gateway = Gateway([], tmp_path / "log", flags(worker.port), waits_for_workers=False)
        with gateway:
            cluster.put("worker-0", is_ready=False)
            time.sleep(2)
            assert gateway.healthy() == set()
            cluster.put("worker-0", is_ready=True)
            assert seconds_until(lambda: gateway.healthy() == {worker.url}) < 10
            assert gateway.post("/v1/chat/completions", CHAT).json()["text"] == "pod"

            begun = pool.submit(gateway.post, "/v1/chat/completions", {**CHAT, "tokens_after_s": 3})
            time.sleep(0.5)
            cluster.put("worker-0", is_ready=True, is_leaving=True)
            assert seconds_until(lambda: gateway.healthy() == set()) < 5
            assert gateway.post("/v1/chat/completions", CHAT).status_code == 503
            assert begun.result().json()["text"] == "pod"
            cluster.delete("worker-0")
            ready = requests.get(f"{gateway.url}/readiness", timeout=5).status_code
            assert ready == 503
        asked = [path for path in cluster.paths if "/namespaces/tiered-kv/pods" in path]
        assert asked == cluster.paths  # all that the Role allows
