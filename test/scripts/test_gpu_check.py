"""scripts/gpu_check runs every part, small, on a CPU, goes on where it was, says what it lacks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmark.gpu import __main__ as check
from benchmark.gpu import environment, report, serving
from benchmark.gpu.setting import Setting
from benchmark.simulation.probe import Answer

ROOT = Path(__file__).parents[2]
CHEAP = ("environment", "kernels", "transfers", "cascade")


def gpu_check(out: Path, *arguments: str, timeout: float = 200) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "TIERED_KV_PYTHON": sys.executable,
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [str(ROOT / "scripts" / "gpu_check"), "--out", str(out), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The cheap parts, measured once: their folder, and what was printed."""
    out = tmp_path_factory.mktemp("gpu_check") / "out"
    result = gpu_check(out, "--small", "--parts", *CHEAP)
    assert result.returncode == 0, result.stderr
    return out, result.stdout


def result_of(out: Path, part: str) -> dict[str, Any]:
    document = json.loads((out / f"{part}.json").read_text())
    assert document["is_small"]
    assert "result" in document, document
    result: dict[str, Any] = document["result"]
    return result


@pytest.mark.slow
def test_kernels_agree_with_their_references(checked: tuple[Path, str]) -> None:
    result = result_of(checked[0], "kernels")
    assert {"raw", "fp8", "int4"} <= set(result["correct"])
    assert all(result["correct"].values())
    assert {row["contender"] for row in result["rows"]} == {"memcpy", "index_select", "torch"}
    assert all(row["gb_per_s"] > 0 for row in result["rows"])
    assert "All as the reference." in checked[1]


@pytest.mark.slow
def test_transfers_compare_ours_with_upstreams_and_memcpy(checked: tuple[Path, str]) -> None:
    result = result_of(checked[0], "transfers")
    assert result["exact"]["ours"] is True
    assert result["exact"]["HiCache direct, layer_first"] is True
    rows = [row for row in result["rows"] if row["mover"] == "ours"]
    assert {(row["direction"], row["tokens"]) for row in rows} == {
        (direction, tokens) for direction in ("to device", "to host") for tokens in (64, 256)
    }
    assert all(row["bytes_per_s"] > 0 and row["share_of_memcpy"] > 0 for row in rows)
    assert sum(row["interference"] is not None for row in rows) == 2
    (absent,) = [row for row in result["rows"] if row["mover"] == "HiCache kernel, page_first"]
    assert "CUDA" in absent["reason"]


@pytest.mark.slow
def test_every_part_is_in_the_report(checked: tuple[Path, str]) -> None:
    out, printed = checked
    assert (out / "report.md").read_text() == printed
    for part in CHEAP:
        assert f"## {part}" in printed
    assert "Not measured" not in printed
    assert "figures of such say nothing" in printed


def test_what_is_there_is_kept_until_asked_for_again(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--small", "--device", "cpu", "--out", str(tmp_path), "--parts", "environment"]
    path = tmp_path / "environment.json"
    inodes = []
    for more, is_kept in (([], False), ([], True), (["--again"], False)):
        assert check.main([*arguments, *more]) == 0
        inodes.append(path.stat().st_ino)
        assert ("kept" in capfd.readouterr().err) == is_kept
    assert inodes[0] == inodes[1]


def test_only_figures_of_this_device_and_size_are_kept(tmp_path: Path) -> None:
    setting = Setting(torch.device("cpu"), True, tmp_path)
    done = {"schema": 1, "device": "cpu", "is_small": True, "result": {}}
    assert check.is_done(done, setting)
    for changes in ({"device": "NVIDIA H200"}, {"is_small": False}):
        assert not check.is_done({**done, **changes}, setting)
    del done["result"]
    assert not check.is_done({**done, "reason": "no such kernel"}, setting)
    (tmp_path / "broken.json").write_text("{")
    assert not check.is_done(check.read_part(tmp_path / "broken.json"), setting)


def test_full_sizes_are_refused_without_a_gpu(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert check.main(["--device", "cpu", "--out", str(tmp_path / "out")]) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert "add --small" in line
    assert not (tmp_path / "out").exists()


SAMPLE = {"system": "tiered", "state": serving.HOST, "tokens": 32768, "cached_tokens": 32704}


def served(host_s: float, hicache_s: float, fresh_s: float) -> dict[str, Any]:
    times = (
        ("tiered", serving.HOST, host_s),
        ("hicache", serving.HOST, hicache_s),
        ("plain", serving.FRESH, fresh_s),
    )
    samples = [
        {**SAMPLE, "system": system, "state": state, "ttft_s": seconds, "by_tier": {"host": 1}}
        for system, state, seconds in times
    ]
    result = {"samples": samples, "decoding": {}, "failed": {}}
    return {"serving": {"is_small": False, "result": result}}


@pytest.mark.parametrize(
    ("times", "verdicts"),
    [((0.1, 0.2, 1.0), ["met", "met"]), ((0.3, 0.2, 1.0), ["MISSED", "MISSED"])],
)
def test_targets_are_judged_by_what_was_measured(
    times: tuple[float, float, float], verdicts: list[str]
) -> None:
    lines = report.targets(served(*times))
    assert [line.split(":")[0].removeprefix("- ") for line in lines] == verdicts


def test_cascade_must_never_be_slower() -> None:
    rows = [{"off_by_on": 1.4}, {"off_by_on": 0.97}]
    found = {"cascade_server": {"is_small": False, "result": {"rows": rows}}}
    (line,) = report.targets(found)
    assert line.startswith("- MISSED: least gain of an iteration by cascade 0.970")


def test_the_most_that_pcie_can_carry() -> None:
    smi = {"pcie.link.gen.max": "5", "pcie.link.width.max": "16"}
    assert environment.pcie_peak_bytes_s(smi) == pytest.approx(63.0e9, rel=1e-3)
    assert environment.pcie_peak_bytes_s({**smi, "pcie.link.gen.max": "[N/A]"}) is None
    assert environment.pcie_peak_bytes_s({}) is None


def test_a_system_that_failed_is_named() -> None:
    results = served(0.1, 0.2, 1.0)
    results["serving"]["result"]["failed"] = {"hicache": "the server ended with code 1"}
    text = report.report(results)
    assert "hicache failed: the server ended with code 1" in text
    assert "| 32,768 | after others | 100 (host 1) | 200 (host 1) |  |" in text


def test_the_dummy_model_is_llama_8b(tmp_path: Path) -> None:
    from tiered_kv.core.model_spec import ModelSpec, find_model

    folder = serving.write_model(tmp_path / "model", is_small=False)
    config = json.loads((folder / "config.json").read_text())
    model, known = ModelSpec.from_hf_config(config, name="x"), find_model("Llama-3.1-8B")
    assert model.n_parameters == known.n_parameters
    assert model.kv_bytes_per_token == known.kv_bytes_per_token
    assert model.kv_bytes_per_token == serving.LARGE_SIZES.token_bytes


class ThreeTiers:
    """A server's cache: tokens of each prompt on the device, least recently asked first to go."""

    def __init__(self, sizes: serving.Sizes) -> None:
        self.sizes = sizes
        self.device: dict[int, int] = {}
        self.host: dict[int, int] = {}
        self.disk: dict[int, int] = {}
        self.n_computed = 0

    def tokens(self, n: int) -> list[int]:
        self.n_prompts = getattr(self, "n_prompts", 0) + 1
        return [self.n_prompts] * n

    def ask(self, prompt: list[int], n_new: int = 1) -> Answer:
        name, n_tokens = prompt[0], len(prompt)
        found = {"device": self.device.pop(name, 0)}
        for tier, held in (("host", self.host), ("storage", self.disk)):
            found[tier] = max(0, held.get(name, 0) - sum(found.values()))
        cached = sum(found.values())
        self.n_computed += n_tokens - cached
        self.device[name] = self.host[name] = self.disk[name] = n_tokens - 1
        for other in list(self.device):
            surplus = sum(self.device.values()) - self.sizes.device_tokens
            self.device[other] -= min(max(surplus, 0), self.device[other])
        assert sum(self.host.values()) <= self.sizes.host_tokens
        return Answer(0.0, [1.0], cached, found)

    def flush(self, _server: object) -> None:
        self.device.clear()
        self.host.clear()


@pytest.mark.parametrize("sizes", [serving.LARGE_SIZES, serving.SMALL_SIZES])
def test_prompts_are_where_their_state_says(
    monkeypatch: pytest.MonkeyPatch, sizes: serving.Sizes
) -> None:
    cache = ThreeTiers(sizes)
    monkeypatch.setattr(serving, "Probe", lambda _url, seed: cache)
    monkeypatch.setattr(serving, "flush", cache.flush)
    server = SimpleNamespace(url="")
    samples = list(serving.first_tokens(server, "tiered", sizes))  # type: ignore[arg-type]
    page = sizes.page_tokens
    tier_of = {serving.DEVICE: "device", serving.HOST: "host", serving.DISK: "storage"}
    for sample in samples:
        if sample.state == serving.FRESH:
            assert sample.cached_tokens == 0
            continue
        assert sample.by_tier[tier_of[sample.state]] >= sample.tokens - page, sample
    kinds = {(sample.state, sample.tokens) for sample in samples}
    assert len(kinds) == 4 * len(sizes.lengths)
    # What is computed is written: it must fit the disk tier that the server is given.
    assert cache.n_computed * sizes.token_bytes < 40e9


def test_time_per_token_counts_pieces_of_two_tokens_as_two(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Answers that overlap from second 10 on; a token each second, two of them in one piece."""
    times = iter(([8.0, 9.0, 10.0, 11.0, 12.0], [10.0, 12.0, 12.0, 13.0, 14.0]))
    probe = SimpleNamespace(
        tokens=lambda n: [1] * n, ask=lambda _prompt, _n: Answer(0.0, next(times))
    )
    monkeypatch.setattr(serving, "Probe", lambda _url, seed: probe)
    found = serving.output_tokens(SimpleNamespace(url=""), serving.SMALL_SIZES)  # type: ignore[arg-type]
    assert found["tpot_s"] == pytest.approx(1.0)
    assert found["tpot_p99_s"] == 2.0


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_every_system_gets_flags_that_the_server_has(
    tmp_path: Path, server_flags: set[str], device: str
) -> None:
    setting = Setting(torch.device(device), device == "cpu", tmp_path)
    sizes = serving.SMALL_SIZES
    found = serving.systems(setting, sizes, tmp_path)
    assert list(found) == ["plain", "hicache", "tiered"]
    words = serving.common_flags(setting, sizes)
    for extra in found.values():
        words += extra["args"]
    assert {word for word in words if word.startswith("--")} <= server_flags


@pytest.mark.long
@pytest.mark.server
@pytest.mark.timeout(600)
def test_cascade_on_real_servers(tmp_path: Path) -> None:
    result = gpu_check(tmp_path, "--small", "--parts", "cascade_server", timeout=560)
    assert result.returncode == 0, result.stderr
    (row,) = result_of(tmp_path, "cascade_server")["rows"]
    assert (row["rows"], row["equal_answers"]) == (4, 4)
    assert row["on_ms"] > 0
    assert "## cascade_server" in result.stdout


@pytest.mark.long
@pytest.mark.server
@pytest.mark.timeout(900)
def test_the_real_server_answers_from_every_tier(tmp_path: Path) -> None:
    result = gpu_check(tmp_path, "--small", "--parts", "serving", timeout=850)
    assert result.returncode == 0, result.stderr
    found = result_of(tmp_path, "serving")
    assert found["failed"] == {}
    for tokens in serving.SMALL_SIZES.lengths:
        for state, tier in ((serving.DEVICE, "device"), (serving.HOST, "host")):
            (sample,) = report.samples_of(found, "tiered", state, tokens)
            assert sample["by_tier"].get(tier, 0) > 0, sample
        (sample,) = report.samples_of(found, "tiered", serving.DISK, tokens)
        assert sample["by_tier"].get("storage", 0) > 0, sample
        (sample,) = report.samples_of(found, "plain", serving.DISK, tokens)
        assert sample["cached_tokens"] == 0
    assert set(found["decoding"]) == {"plain", "hicache", "tiered"}
