"""`python -m tiered_kv.simulation` from arguments to files."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from support_simulation.builders import server
from tiered_kv.core.config import TieredKVConfig
from tiered_kv.core.device_spec import find_device
from tiered_kv.core.errors import ConfigError
from tiered_kv.scheduler.measured_costs import PassTimes
from tiered_kv.scheduler.request_policy import REQUEST_POLICY_DEFAULT
from tiered_kv.simulation import schema
from tiered_kv.simulation.__main__ import main
from tiered_kv.simulation.capacity import best_capacity, saturated_capacity
from tiered_kv.simulation.jobs import Job, WorkloadChoice, run_job
from tiered_kv.simulation.measured_server import MeasuredServer
from tiered_kv.simulation.policies import SIMULATED, SIMULATED_ORDERS
from tiered_kv.simulation.server_defaults import default_chunk_tokens

CHAT = ["--workload", "chat", "--limit", "20"]
RAG = ["--workload", "rag", "--limit", "120"]
MIX = "interactive:0.6:0.5:0.05,standard:0.3:2:0.1,batch:0.1:30:-"


def test_help_names_policies_and_shows_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    assert "examples" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    shown = " ".join(capsys.readouterr().out.split()).replace("- ", "-")
    for name in ("hrrn", "k-lpm", "niyama", *SIMULATED, *SIMULATED_ORDERS, "H200-141"):
        assert name in shown


def test_run_prints_a_table_and_writes_result_and_timeline(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, trace = tmp_path / "run.json", tmp_path / "trace.json"
    tiers = ["--device-kv", "4GB", "--host", "4GB", "--disk", "20GB"]
    code = main(["run", *CHAT, *tiers, "--out", str(out), "--timeline", str(trace)])
    assert code == 0
    assert capsys.readouterr().out.startswith("| policy | eviction |")
    (run,) = schema.read_results(out)["runs"]
    assert run["n_finished"] == run["n_requests"] >= 20
    events = json.loads(trace.read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert {"prefill", "decode"} <= {event["name"] for event in spans}
    assert all(event["dur"] >= 0 for event in spans)
    forward = sorted(
        (event["ts"], event["dur"]) for event in spans if event["name"] in {"prefill", "decode"}
    )
    for (start, duration), (following, _) in itertools.pairwise(forward):
        assert start + duration <= following * (1 + 1e-12) + 1e-3
    assert {"requests", "cached tokens"} <= {
        event["name"] for event in events if event["ph"] == "C"
    }


@pytest.mark.parametrize("capacity", ["saturation", "objectives"])
def test_sweep_finds_the_capacity_and_report_and_compare_read_it(
    capacity: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sweep.json"
    load = ["--slo-mix", MIX, "--loads", "0.8,1.2", "--capacity", capacity]
    assert main(["sweep", *RAG, *load, "--policies", "fcfs,edf", "--out", str(out)]) == 0
    data = schema.read_results(out)
    assert [run["labels"]["name"] for run in data["runs"]] == ["fcfs", "edf", "fcfs", "edf"]
    rates = [run["workload"]["rate"] for run in data["runs"]]
    assert rates[2] / rates[0] == pytest.approx(1.5, rel=1e-4)
    assert rates[0] / data["capacity"]["rate"] == pytest.approx(0.8, rel=1e-4)
    capsys.readouterr()
    assert main(["report", str(out), "--out", str(tmp_path / "report")]) == 0
    text = (tmp_path / "report" / "report.md").read_text()
    for line in text.splitlines():
        if line.startswith("!["):
            assert (tmp_path / "report" / line.split("](")[1][:-1]).stat().st_size > 1000
    assert "goodput.png" in text
    capsys.readouterr()
    assert main(["compare", str(out), str(out)]) == 0
    assert capsys.readouterr().out.count("1.000") >= 4 * 6


def test_two_workers_give_what_one_does(tmp_path: Path) -> None:
    results = []
    for workers in ("1", "2"):
        out = tmp_path / f"{workers}.json"
        command = [sys.executable, "-m", "tiered_kv.simulation", "sweep", *CHAT]
        command += ["--policies", "fcfs,lpm", "--rates", "1,4", "--workers", workers]
        subprocess.run([*command, "--out", str(out)], check=True, capture_output=True, timeout=300)
        runs = schema.read_results(out)["runs"]
        for run in runs:
            del run["wall_s"]
        results.append(runs)
    assert results[0] == results[1]


@pytest.mark.parametrize(
    ("arguments", "known"),
    [
        (["--policy", "nope"], "fcfs"),
        (["--eviction", "nope"], "lru"),
        (["--model", "nope"], "Llama-3.1-8B"),
        (["--device", "nope"], "H200-141"),
        (["--disk", "1GB"], "host"),
        (["--max-new-tokens", "many"], "exact"),
        (["--model", "Llama-3.1-70B", "--device", "A10"], "larger"),
    ],
)
def test_what_cannot_be_simulated_is_said_in_one_sentence(
    arguments: list[str], known: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", *CHAT, *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert known in error


def test_the_best_capacity_is_the_crossing(monkeypatch: pytest.MonkeyPatch) -> None:
    # Attainment falls linearly to a half at each job's own rate: the best crosses 0.9 at 4 / 5.
    limits = {"a": 1.0, "b": 4.0, "c": 2.0}

    class FakeJob:
        def __init__(self, name: str, rate: float = 1.0) -> None:
            self.name, self.rate = name, rate

        def at_rate(self, rate: float) -> FakeJob:
            return FakeJob(self.name, rate)

    def fake_run(job: FakeJob) -> dict[str, float]:
        return {"attainment": max(0.0, 1.0 - 0.5 * job.rate / limits[job.name])}

    monkeypatch.setattr("tiered_kv.simulation.capacity.run_job", fake_run)
    found = best_capacity({name: FakeJob(name) for name in limits}, tolerance=0.01)
    unloaded = 1.0 - 0.5 * 0.02 / 4.0
    assert found.best == "b"
    assert found.target == pytest.approx(0.9 * unloaded)
    assert found.rate == pytest.approx((1.0 - found.target) * 2 * 4.0, rel=0.02)
    assert len(found.trials) < 20


def rag_job(n_requests: int) -> Job:
    workload = WorkloadChoice(spec=f"rag,requests={n_requests}")
    return Job(workload=workload, settings=server(device_blocks=20_000))


def test_a_server_keeps_up_below_saturation_and_falls_behind_above() -> None:
    job = rag_job(400)
    found = saturated_capacity({"fcfs": job})
    below, at, above = (run_job(job.at_rate(found.rate * load)) for load in (0.5, 1.0, 1.6))
    waits_s = [run["wait_s"]["p90"] for run in (below, at, above)]
    assert 2 * waits_s[0] < waits_s[1] < waits_s[2] / 4, waits_s
    # What it answers per second does not grow any more.
    assert above["throughput_rps"] < 1.15 * at["throughput_rps"]
    assert at["throughput_rps"] > 1.5 * below["throughput_rps"]


def test_what_arrives_all_at_once_has_no_rate_to_scale(tmp_path: Path) -> None:
    line = {"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [0, 1]}
    (tmp_path / "trace.jsonl").write_text(json.dumps(line) + "\n")
    workload = WorkloadChoice(spec=f"mooncake:{tmp_path / 'trace.jsonl'}")
    job = Job(workload=workload, settings=server())
    with pytest.raises(ConfigError, match="at once"):
        saturated_capacity({"fcfs": job})


def test_a_measured_server_takes_the_place_of_the_roofline(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    times = dict.fromkeys(PassTimes.__slots__, 0.0) | {"prefill_fixed_s": 7.0}
    measured = MeasuredServer(
        host="a machine",
        model="SmolLM2-135M",
        element_bytes=4,
        times=PassTimes(**times),
        request_overhead_s=0.0,
    )
    path, out = tmp_path / "measured.json", tmp_path / "out.json"
    path.write_text(json.dumps(measured.to_json()))
    command = ["run", "--workload", "best_of_n,prompts=1,samples=1", "--measured", str(path)]
    assert main(command) == 2
    assert "--device-kv" in capsys.readouterr().err
    assert main([*command, "--device-kv", "1GB", "--out", str(out)]) == 0
    (run,) = json.loads(out.read_text())["runs"]
    assert run["settings"]["device"] == "a machine"
    assert run["ttft_s"]["p50"] == pytest.approx(7.0)


def settings_of(tmp_path: Path, *arguments: str) -> dict[str, object]:
    out = tmp_path / "out.json"
    workload = ["--workload", "best_of_n,prompts=1,samples=1", "--device-kv", "4GB"]
    assert main(["run", *workload, *arguments, "--out", str(out)]) == 0
    (run,) = schema.read_results(out)["runs"]
    return dict(run["settings"])


def test_server_defaults_are_a_server_that_is_given_nothing(tmp_path: Path) -> None:
    found = settings_of(tmp_path, "--server-defaults")
    config = TieredKVConfig()
    assert found["policy"] == REQUEST_POLICY_DEFAULT
    assert found["eviction"] == config.eviction_policy
    assert found["load_policy"] == config.load_policy
    assert found["stop_policy"] == "patience"
    assert found["iteration_policy"] == "all"
    assert found["host_tokens"] == pytest.approx(2 * found["device_tokens"], abs=2)
    assert found["disk_tokens"] == pytest.approx(8 * found["device_tokens"], rel=1e-3)
    assert (found["chunk_tokens"], found["swap"]) == (8192, False)


def test_what_is_given_beside_server_defaults_counts_wherever_it_stands(tmp_path: Path) -> None:
    given = ["--policy", "fcfs", "--server-defaults", "--host", "1GB", "--disk", "2GB"]
    found = settings_of(tmp_path, *given, "--chunk", "512")
    assert (found["policy"], found["eviction"], found["chunk_tokens"]) == ("fcfs", "lru", 512)
    assert found["disk_tokens"] == pytest.approx(2 * found["host_tokens"], abs=2)
    assert found["stop_policy"] == "patience"
    plain = settings_of(tmp_path)
    assert (plain["policy"], plain["host_tokens"], plain["disk_tokens"]) == ("fcfs", 0, 0)


@pytest.mark.parametrize(
    ("device", "chunk"), [("A10", 2048), ("L40S", 4096), ("4xH100-80", 8192), ("H200-141", 8192)]
)
def test_the_chunk_is_upstreams_for_the_device(device: str, chunk: int) -> None:
    assert default_chunk_tokens(find_device(device)) == chunk
