"""scripts/gpu_check plays its steps, small, on a CPU; goes on where it was; says what it lacks."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmark.gpu import __main__ as check
from benchmark.gpu import plan, record, report, run, systems, ttft
from benchmark.gpu.plan import ALONE, FIGURES, STEPS, Step, next_step
from benchmark.gpu.setting import Setting
from support.first_part import SITECUSTOMIZE
from support.python_path import ahead_on_path

ROOT = Path(__file__).parents[2]
#: What no server is needed for: played in every run of the tests.
CHEAP = ("alone", "cascade_kernel")
WITH_SERVERS = (
    "compiled", "answers", "answers_more", "ttft_plain", "ttft_tiered", "ttft_hicache", "mixing",
    "cascade_server", "ttft_more",
)  # fmt: skip


def gpu_check(
    out: Path, *arguments: str, timeout: float = 200, **more: str
) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        **more,
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
    """The steps without a server, played once: their folder, and what was printed. The first group
    has nothing but the bundle's first part."""
    folder = tmp_path_factory.mktemp("gpu_check")
    (folder / "sitecustomize.py").write_text(SITECUSTOMIZE)
    path = ahead_on_path(folder)
    out = folder / "out"
    alone, more = CHEAP
    result = gpu_check(out, "--rehearse", "--steps", alone, timeout=500, PYTHONPATH=path)
    assert result.returncode == 0, result.stderr
    result = gpu_check(out, "--rehearse", "--steps", more, timeout=500)
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
        group: sum(
            step.limit_s for step in STEPS if step.group == group and step.name != plan.COMPILED
        )
        for group in plan.GROUPS
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
    deadline_s = time.monotonic() + 10
    while is_alive(document["result"]["child"]):
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def is_alive(process: int) -> bool:
    """Neither gone nor waiting for its parent to look."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False
    return re.search(r"State:\t[ZX]", status) is None


def test_what_ran_out_of_time_has_twice_as_long_the_next_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[float] = []

    def late(step: Step, folder: Path, device: str, limit_s: float, *, is_small: bool) -> str:
        limits.append(limit_s)
        notes = record.Record(folder / f"{step.name}.json", step.name, device, is_small)
        return str(notes.write(record.LATE)["state"])

    monkeypatch.setattr(check, "run_step", late)
    monkeypatch.setattr(check, "NAMES", ("works",))
    for _ in range(2):
        check.run_all(
            [made("works", 60)], tmp_path, torch.device("cpu"), 1000, is_small=False, again=False
        )
    assert limits == [60, 120]


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


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_every_system_gets_flags_that_the_server_has(
    tmp_path: Path, server_flags: set[str], device: str
) -> None:
    from benchmark.gpu import answers, answers_more, mixing

    setting = Setting(torch.device(device), device == "cpu", tmp_path)
    sizes = ttft.SMALL_SIZES
    words = systems.common_flags(setting, 64, 1024)
    for name in ("plain", "hicache", "tiered"):
        words += ttft.system_of(setting, name, sizes, tmp_path)["args"]
    words += [*answers_more.EAGER, *answers_more.CASCADE, *answers_more.MAKE_WAY]
    words += answers.AS_PLAIN
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
    for step in WITH_SERVERS:
        assert not result_of(out, step).get("trouble"), step
    (row,) = result_of(out, "cascade_server")["rows"]
    assert (row["rows"], row["equal_answers"]) == (4, 4)
