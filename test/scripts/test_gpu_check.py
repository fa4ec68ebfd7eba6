"""scripts/gpu_check plays its steps, small, on a CPU; goes on where it was; says what it lacks."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmark.gpu import __main__ as check
from benchmark.gpu import answers, environment, plan, record, report, run, systems, ttft
from benchmark.gpu.plan import ALONE, FIGURES, STEPS, Step, next_step
from benchmark.gpu.setting import Setting
from benchmark.simulation.probe import Answer

ROOT = Path(__file__).parents[2]
#: What no server is needed for: played in every run of the tests.
CHEAP = ("alone", "cascade_kernel")
WITH_SERVERS = ("answers", "answers_more", "ttft_plain", "ttft_tiered", "ttft_hicache", "mixing",
                "cascade_server", "ttft_more")  # fmt: skip


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
    """The steps without a server, played once: their folder, and what was printed."""
    out = tmp_path_factory.mktemp("gpu_check") / "out"
    result = gpu_check(out, "--rehearse", "--steps", *CHEAP, timeout=500)
    assert result.returncode == 0, result.stderr
    return out, result.stdout


def result_of(out: Path, step: str) -> dict[str, Any]:
    document = json.loads((out / f"{step}.json").read_text())
    assert document["is_small"]
    assert document["state"] == "done", document
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
def test_copies_are_compared_with_memcpy(checked: tuple[Path, str]) -> None:
    result = result_of(checked[0], "copies")
    assert result["exact"]["ours, dma"] is True
    rows = [row for row in result["rows"] if row["mover"] == "ours, dma"]
    assert {(row["direction"], row["tokens"]) for row in rows} == {
        (direction, tokens) for direction in ("to device", "to host") for tokens in (64, 256)
    }
    assert all(row["bytes_per_s"] > 0 and row["share_of_memcpy"] > 0 for row in rows)
    assert sum(row["interference"] is not None for row in rows) == 2
    assert sum(row["bytes_per_s_both"] is not None for row in rows) == 2


@pytest.mark.slow
def test_histories_are_played_on_real_streams(checked: tuple[Path, str]) -> None:
    result = result_of(checked[0], "order")
    assert all(n > 0 for n in result["histories"].values())
    assert len(result["left_out"]) == 3


@pytest.mark.slow
def test_every_step_is_in_the_report_and_in_the_one_file(checked: tuple[Path, str]) -> None:
    out, printed = checked
    assert (out / "report.md").read_text() == printed
    together = json.loads((out / "check.json").read_text())
    played = [step.name for step in STEPS if step.group == ALONE] + ["cascade_kernel"]
    assert list(together["steps"]) == [name for name in plan.NAMES if name in played]
    assert together["logs"] == {}
    for name in played:
        assert f"## {name}" in printed
        assert f"| {name} | done |" in printed
    assert "| answers | not tried |" in printed
    assert "makes no table" not in printed
    assert "figures of such say nothing" in printed


# -- what comes next --------------------------------------------------------------------------


def steps(*limits: tuple[str, float, float]) -> list[Step]:
    return [Step(name, FIGURES, limit, least, "x:y", "") for name, limit, least in limits]


def test_what_was_never_tried_comes_before_what_failed() -> None:
    three = steps(("a", 10, 5), ("b", 10, 5), ("c", 10, 5))
    states: dict[str, str] = {"a": "failed"}
    order = []
    while (step := next_step(states, order, 100, three)) is not None:
        order.append(step.name)
        states[step.name] = "failed"
    assert order == ["b", "c", "a"]


def test_what_is_done_is_not_done_again() -> None:
    three = steps(("a", 10, 5), ("b", 10, 5), ("c", 10, 5))
    states = {"a": "done", "b": "out of time", "c": "not here"}
    # What was not here may be by now: nobody has tried it.
    step = next_step(states, [], 100, three)
    assert step is not None
    assert step.name == "c"


def test_what_there_is_no_time_for_gives_way_to_what_is_shorter() -> None:
    three = steps(("a", 100, 50), ("b", 10, 5), ("c", 20, 15))
    step = next_step({}, [], 12, three)
    assert step is not None
    assert step.name == "b"
    assert next_step({}, [], 4, three) is None
    assert next_step({}, [], 4, three, is_small=True) is not None


def test_the_plan_fits_its_times() -> None:
    """The first group in a minute and a half, the next in two and a half more, as docs/gpu.md."""
    by_group = {
        group: sum(step.limit_s for step in STEPS if step.group == group) for group in plan.GROUPS
    }
    assert by_group[plan.ALONE] <= 90
    assert by_group[plan.SERVES] <= 150
    assert all(0 < step.least_s <= step.limit_s for step in STEPS)
    assert [step.group for step in STEPS] == sorted(
        (step.group for step in STEPS), key=plan.GROUPS.index
    )
    text = (ROOT / "docs" / "gpu.md").read_text()
    for step in STEPS:
        assert f"| `{step.name}` | {step.limit_s:g} |" in text


@pytest.mark.parametrize(
    ("text", "seconds"), [("15m", 900), ("90s", 90), ("540", 540), ("1h", 3600)]
)
def test_times(text: str, seconds: float) -> None:
    assert plan.seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "-5m", "0", "nan"])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        plan.seconds_of(text)


# -- steps and what becomes of them -----------------------------------------------------------


def made(name: str, limit_s: float = 60) -> Step:
    return Step(name, ALONE, limit_s, 1, f"support.gpu_steps:{name}", "")


def run_made(folder: Path, name: str, limit_s: float = 60) -> tuple[str, dict[str, Any]]:
    step = made(name)
    state = run.run_step(step, folder, "cpu", limit_s, is_small=True)
    document = record.read(folder / f"{name}.json")
    assert document is not None
    assert document["state"] == state
    return state, document


def test_each_step_goes_on_when_one_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("fails", "dies", "lacks", "is_elsewhere", "works")
    monkeypatch.setattr(check, "NAMES", names)
    tried = check.run_all(
        [made(name) for name in names], tmp_path, torch.device("cpu"), 300, is_small=True,
        again=False,
    )  # fmt: skip
    assert tried == list(names)
    together = json.loads((tmp_path / "check.json").read_text())
    states = {name: found["state"] for name, found in together["steps"].items()}
    assert states == {
        "fails": "failed", "dies": "failed", "lacks": "not here", "is_elsewhere": "not here",
        "works": "done",
    }  # fmt: skip
    failed = together["steps"]["fails"]
    assert failed["result"] == {"rows": [1]}
    assert failed["reason"] == "ended with code 1: RuntimeError: kernels do not launch here"
    # The whole output of what failed, and of nothing else that is done.
    assert "the first line of many" in together["logs"]["fails.log"]
    assert "Traceback" in together["logs"]["fails.log"]
    assert "works.log" not in together["logs"]
    assert "no_such_package is not installed" in together["steps"]["lacks"]["reason"]
    assert together["steps"]["works"]["result"] == {"answer": 42, "is_small": True}


def test_a_step_that_hangs_is_ended_with_all_that_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "GRACE_S", 1.0)
    began_s = time.monotonic()
    state, document = run_made(tmp_path, "hangs", limit_s=12)
    assert state == "out of time"
    assert time.monotonic() - began_s < 60
    assert document["reason"].startswith("stopped after ")
    status = Path(f"/proc/{document['result']['child']}/status")
    assert not status.exists() or "State:\tZ" in status.read_text()


def test_what_is_there_is_kept_until_asked_for_again(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--rehearse", "--device", "cpu", "--out", str(tmp_path), "--steps", "environment"]
    path = tmp_path / "environment.json"
    inodes = []
    for more in ([], [], ["--again"]):
        assert check.main([*arguments, *more]) == 0
        inodes.append(path.stat().st_ino)
    assert inodes[0] == inodes[1] != inodes[2]
    # The one file of all is enough to go on.
    path.unlink()
    assert check.main(arguments) == 0
    assert "environment: done after" not in capfd.readouterr().err.splitlines()[-1:]
    assert record.read(path) is not None


def test_only_figures_of_this_device_and_size_are_kept() -> None:
    done = {"device": "cpu", "is_small": True}
    assert check.is_of_this(done, "cpu", is_small=True)
    assert not check.is_of_this({**done, "device": "NVIDIA H200"}, "cpu", is_small=True)
    assert not check.is_of_this({**done, "is_small": False}, "cpu", is_small=True)


def test_a_broken_file_is_none(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{")
    assert record.read(tmp_path / "broken.json") is None


def test_full_sizes_are_refused_without_a_gpu(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert check.main(["--device", "cpu", "--out", str(tmp_path / "out")]) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert "add --rehearse" in line
    assert not (tmp_path / "out").exists()


# -- what is made of the figures --------------------------------------------------------------

SAMPLE = {"state": ttft.HOST, "tokens": 32768, "cached_tokens": 32704, "by_tier": {"host": 1}}


def served(host_s: float, hicache_s: float, fresh_s: float) -> dict[str, Any]:
    times = {
        "tiered": (ttft.HOST, host_s), "hicache": (ttft.HOST, hicache_s),
        "plain": (ttft.FRESH, fresh_s),
    }  # fmt: skip
    return {
        f"ttft_{system}": {
            "is_small": False,
            "state": "done",
            "result": {
                "samples": [{**SAMPLE, "system": system, "state": state, "ttft_s": seconds}],
                "decoding": {},
            },
        }
        for system, (state, seconds) in times.items()
    }


@pytest.mark.parametrize(
    ("times", "verdicts"),
    [((0.1, 0.2, 1.0), ["met", "met"]), ((0.3, 0.2, 1.0), ["MISSED", "MISSED"])],
)
def test_targets_are_judged_by_what_was_measured(
    times: tuple[float, float, float], verdicts: list[str]
) -> None:
    lines = report.targets(served(*times))
    assert [line.split(":")[0].removeprefix("- ") for line in lines] == verdicts


def test_copies_are_judged_by_the_way_that_auto_takes() -> None:
    def row(mover: str, direction: str, speed: float, share: float, felt: float) -> dict[str, Any]:
        return {
            "mover": mover, "direction": direction, "tokens": 16384, "bytes_per_s": speed,
            "share_of_memcpy": share, "interference": felt,
        }  # fmt: skip

    rows = [
        row("ours, dma", "to device", 50e9, 0.92, 0.01),
        row("ours, kernel", "to device", 40e9, 0.73, 0.2),
        row("ours, dma", "to host", 30e9, 0.5, 0.05),
    ]
    lines = report.targets({"copies": {"is_small": False, "result": {"rows": rows}}})
    assert [line.split(":")[0] for line in lines] == ["- met", "- met", "- MISSED", "- MISSED"]


def test_cascade_must_gain_what_its_bytes_allow_and_never_be_slower() -> None:
    kernel = [{"rows": 64, "shared": 8192, "part_of_bytes": 0.7}]
    servers = [
        {"rows": 64, "shared": 8192, "off_by_on": 1.6},
        {"rows": 16, "shared": 1024, "off_by_on": 0.97},
    ]
    found = {
        "cascade_kernel": {"is_small": False, "result": {"rows": kernel}},
        "cascade_server": {"is_small": False, "result": {"rows": servers}},
    }
    lines = report.targets(found)
    assert [line.split(":")[0] for line in lines] == ["- MISSED", "- met", "- MISSED"]
    assert "least gain of an iteration by cascade 0.970" in lines[-1]


def test_a_table_of_what_a_step_had_come_to() -> None:
    found = served(0.1, 0.2, 1.0)
    found["ttft_hicache"]["state"] = "out of time"
    found["ttft_hicache"]["reason"] = "stopped after 100 s: the log's last line"
    found["copies"] = {"is_small": False, "state": "failed", "result": {}, "reason": "x"}
    found["kernels"] = {"is_small": False, "state": "failed", "result": {"rows": []}}
    text = report.report(found)
    assert "| 32,768 | after others | 200 (host 1) |" in text
    assert "Not all of it: stopped after 100 s" in text
    assert "makes no table yet" in text


def test_the_most_that_pcie_can_carry() -> None:
    smi = {"pcie.link.gen.max": "5", "pcie.link.width.max": "16"}
    assert environment.pcie_peak_bytes_s(smi) == pytest.approx(63.0e9, rel=1e-3)
    assert environment.pcie_peak_bytes_s({**smi, "pcie.link.gen.max": "[N/A]"}) is None
    assert environment.pcie_peak_bytes_s({}) is None


def test_the_dummy_model_is_llama_8b(tmp_path: Path) -> None:
    from tiered_kv.core.model_spec import ModelSpec, find_model

    folder = systems.write_model(tmp_path / "model", is_small=False)
    config = json.loads((folder / "config.json").read_text())
    model, known = ModelSpec.from_hf_config(config, name="x"), find_model("Llama-3.1-8B")
    assert model.n_parameters == known.n_parameters
    assert model.kv_bytes_per_token == known.kv_bytes_per_token
    assert model.kv_bytes_per_token == ttft.LARGE_SIZES.token_bytes == answers.LARGE.token_bytes


# -- answers ----------------------------------------------------------------------------------

PLAIN = {
    "tokens": {answers.FRESH: [[1, 2, 3], [4, 5, 6]], answers.DEVICE: [[1, 2, 4], [4, 5, 6]]},
    "gang": [[1, 2, 3, 4]], "gang_alone": [[1, 2, 3, 5]], "strangers": [[9, 9, 9, 9]],
}  # fmt: skip


def said(**changes: Any) -> answers.Answers:
    cached = {state: [{tier: 16}] * 2 for state, tier in answers.TIERS.items()}
    again = PLAIN["tokens"][answers.DEVICE]
    tokens = dict.fromkeys(answers.STATES[1:], again)
    found = answers.Answers(
        tokens={answers.FRESH: PLAIN["tokens"][answers.FRESH], **tokens},
        by_tier={answers.FRESH: [{}, {}], **cached},
    )
    for name, value in changes.items():
        setattr(found, name, value)
    return found


def test_answers_that_are_equal_are_right() -> None:
    found = answers.compared(said(gang=[[1, 2, 8, 8]], strangers=[[9, 9, 9, 9]]), PLAIN)
    assert found["wrong"] == []
    assert found["equal"][answers.HOST] == "2 of 2"
    # Half of what plain SGLang agrees with itself, alone and together.
    assert found["agreement"]["gang"] == 0.5
    assert found["noise"] == 0.25


def test_what_is_wrong_with_answers_is_said() -> None:
    other = said()
    other.tokens[answers.HOST] = [[7, 2, 4], [4, 5, 6]]
    other.by_tier[answers.DISK] = [{"storage": 16}, {"host": 16}]
    other.gang = [[8, 2, 3, 4]]
    wrong = answers.compared(other, PLAIN)["wrong"]
    assert len(wrong) == 3
    assert wrong[0] == "1 answers differ, after others"
    assert wrong[1] == "after a flush: not all came from the storage"
    assert wrong[2].startswith("gang: 0.00 of the answers agree")
    with pytest.raises(RuntimeError, match="tiered: 1 answers differ"):
        answers.check({"wrong": {"tiered": wrong}, "failed": {}})


def test_a_model_whose_answers_depend_on_nothing_says_nothing() -> None:
    assert answers.depends_on_prefix(answers.Answers(tokens={answers.DEVICE: [[1], [2]]}))
    assert not answers.depends_on_prefix(answers.Answers(tokens={answers.DEVICE: [[1], [1]]}))
    with pytest.raises(RuntimeError, match="do not depend on the prefix"):
        answers.check({"wrong": {}, "failed": {}, "depends_on_prefix": False})


# -- first tokens -----------------------------------------------------------------------------


class ThreeTiers:
    """A server's cache: tokens of each prompt on the device, least recently asked first to go."""

    def __init__(self, sizes: ttft.Sizes) -> None:
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


@pytest.mark.parametrize("sizes", [ttft.LARGE_SIZES, ttft.SMALL_SIZES])
def test_prompts_are_where_their_state_says(
    monkeypatch: pytest.MonkeyPatch, sizes: ttft.Sizes
) -> None:
    cache = ThreeTiers(sizes)
    monkeypatch.setattr(ttft, "Probe", lambda _url, seed: cache)
    monkeypatch.setattr(ttft, "flush", cache.flush)
    server = SimpleNamespace(url="")
    samples = list(ttft.first_tokens(server, "tiered", sizes))  # type: ignore[arg-type]
    page = sizes.page_tokens
    tier_of = {ttft.DEVICE: "device", ttft.HOST: "host", ttft.DISK: "storage"}
    for sample in samples:
        if sample.state == ttft.FRESH:
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
    monkeypatch.setattr(ttft, "Probe", lambda _url, seed: probe)
    found = ttft.output_tokens(SimpleNamespace(url=""), ttft.SMALL_SIZES)  # type: ignore[arg-type]
    assert found["tpot_s"] == pytest.approx(1.0)
    assert found["tpot_p99_s"] == 2.0


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_every_system_gets_flags_that_the_server_has(
    tmp_path: Path, server_flags: set[str], device: str
) -> None:
    from benchmark.gpu import answers_more, mixing

    setting = Setting(torch.device(device), device == "cpu", tmp_path)
    sizes = ttft.SMALL_SIZES
    words = systems.common_flags(setting, 64, 1024)
    for name in ("plain", "hicache", "tiered"):
        words += ttft.system_of(setting, name, sizes, tmp_path)["args"]
    words += [*answers_more.EAGER, *answers_more.CASCADE, *answers_more.MAKE_WAY]
    words += [flag for flags in mixing.MODES.values() for flag in flags]
    assert {word for word in words if word.startswith("--")} <= server_flags


@pytest.mark.long
@pytest.mark.server
@pytest.mark.timeout(3000)
def test_every_step_with_servers_plays_on_a_cpu(tmp_path: Path) -> None:
    """One after the other, as on a GPU: answers first, which others compare with."""
    result = gpu_check(
        tmp_path, "--rehearse", "--within", "50m", "--steps", *WITH_SERVERS, timeout=2900
    )
    assert result.returncode == 0, result.stderr
    check_rehearsal(tmp_path)


def check_rehearsal(out: Path) -> None:
    """What steps with servers have found, on a CPU, where every answer must be equal."""
    found = result_of(out, "answers")
    assert found["depends_on_prefix"]
    assert found["tiered_compared"]["wrong"] == []
    assert found["failed"] == {}
    more = result_of(out, "answers_more")
    assert more["wrong"] == {"cascade": [], "make_way": []}
    for tokens in ttft.SMALL_SIZES.lengths:
        tiered = result_of(out, "ttft_tiered")
        for state, tier in ((ttft.DEVICE, "device"), (ttft.HOST, "host")):
            (sample,) = report.samples_of(tiered, "tiered", state, tokens)
            assert sample["by_tier"].get(tier, 0) > 0, sample
        (sample,) = report.samples_of(tiered, "tiered", ttft.DISK, tokens)
        assert sample["by_tier"].get("storage", 0) > 0, sample
        (sample,) = report.samples_of(result_of(out, "ttft_plain"), "plain", ttft.DISK, tokens)
        assert sample["cached_tokens"] == 0
    assert len(result_of(out, "ttft_tiered")["interference"]["busy_s"]) == ttft.INTERFERENCE_TURNS
    assert {row["mode"] for row in result_of(out, "mixing")["rows"]} == {"in turns", "mixed"}
    (row,) = result_of(out, "cascade_server")["rows"]
    assert (row["rows"], row["equal_answers"]) == (4, 4)
