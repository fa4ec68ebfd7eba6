"""A real server with extra tokenizer workers: the plugin is in each of its processes.

Guarantee: schedulers, the detokenizer and every tokenizer worker have loaded plugins and run our
hooks, and the administrative endpoints that SGLang routes to the cache work with `--tiered-kv`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sglang")
psutil = pytest.importorskip("psutil")

from harness.server import Server  # noqa: E402

pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.long]

# Reports, once a second, what of the plugin is there in this process.
REPORTER = """
import json, os, sys, threading, time
def report():
    folder = {folder!r}
    while True:
        time.sleep(1)
        modules = dict(sys.modules)
        if "sglang.srt.server_args" not in modules:
            continue
        hooks = modules.get("tiered_kv.plugin.hooks.table")
        found = {{
            "plugins_loaded": modules["sglang.srt.plugins"]._plugins_loaded
            if "sglang.srt.plugins" in modules else False,
            "prepared": hooks is not None,
            "hooked": sorted(hooks._installed) if hooks else [],
        }}
        path = os.path.join(folder, str(os.getpid()))
        with open(path + ".new", "w") as file:
            json.dump(found, file)
        os.replace(path + ".new", path)
threading.Thread(target=report, daemon=True).start()
"""

#: On 0.5.23 a tokenizer worker ends itself in the middle of its event loop as it finds a SIGTERM.
WORKERS_END = (("ERROR:    Traceback", "asyncio.exceptions.CancelledError"),)


@pytest.fixture
def reports(tmp_path: Path) -> Path:
    """Where the processes of the server report."""
    folder = tmp_path / "reports"
    folder.mkdir()
    return folder


def role(pid: int) -> str:
    """What SGLang calls the process, from its title."""
    title = " ".join(psutil.Process(pid).cmdline())
    for name in ("sglang::scheduler", "sglang::detokenizer"):
        if name in title:
            return name
    return "tokenizer worker" if "multiprocessing" in title or "sglang::" in title else "main"


def test_every_process_is_prepared(
    demo_model: Path, tmp_path: Path, reports: Path, shim: Any
) -> None:
    flags = ["--device", "cpu", "--dtype", "float32", "--max-total-tokens", "4096"]
    flags += ["--tokenizer-worker-num", "2", "--tiered-kv", "--tiered-kv-host-size", "256MB"]
    flags += ["--tiered-kv-disk-dir", str(tmp_path / "disk"), "--tiered-kv-disk-size", "1GB"]
    env = shim(REPORTER.format(folder=str(reports)))
    # Without it uvicorn ends a worker that imports for longer than ten seconds, for ever anew.
    env["SGLANG_UVICORN_WORKER_HEALTHCHECK_TIMEOUT"] = "300"
    with Server(flags, tmp_path / "log", demo_model, env=env, passages=WORKERS_END) as server:
        assert server.process is not None
        server.post("/generate", {"text": "The capital of France is", "sampling_params": {}})
        members = psutil.Process(server.process.pid).children(recursive=True)
        found = {
            member.pid: json.loads((reports / str(member.pid)).read_text())
            for member in members
            if (reports / str(member.pid)).exists()
        }
        roles = sorted(role(pid) for pid in found)
        assert roles.count("sglang::scheduler") == 1, roles
        assert roles.count("sglang::detokenizer") == 1, roles
        assert roles.count("tokenizer worker") == 2, roles
        for pid, report in found.items():
            assert report["plugins_loaded"], role(pid)
            assert report["prepared"], role(pid)
        scheduler = next(pid for pid in found if role(pid) == "sglang::scheduler")
        assert "sglang.srt.managers.scheduler.Scheduler.__init__" in found[scheduler]["hooked"]

        info = server.get("/server_info").json()
        assert info["tiered_kv"] is True
        assert info["radix_cache_backend"] == "tiered_kv"
        assert info["tiered_kv_disk_dir"] == str(tmp_path / "disk")
        assert server.post("/hicache/storage-backend/clear").status_code == 200
        assert server.post("/flush_cache").status_code == 200
