"""The small parts: statistics, spread arrivals, new-token ratio, result files."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from support_simulation.builders import call, random_requests, recorded, server, simulate
from tiered_kv.core.errors import ConfigError
from tiered_kv.simulation import schema, tables
from tiered_kv.simulation.admission import NewTokenRatio
from tiered_kv.simulation.engine import Simulation
from tiered_kv.simulation.execution import Execution
from tiered_kv.simulation.first_turns import FirstTurns
from tiered_kv.simulation.live import RequestRecord
from tiered_kv.simulation.spread import SpreadWorkload
from tiered_kv.simulation.statistics import CDF_SHARES, distribution, meets_slo, summarize
from tiered_kv.simulation.workload.errors import WorkloadError
from tiered_kv.simulation.workload.generators.agents import Agents


def record(ttft_s: float | None, mean_s: float | None, **more: float | None) -> RequestRecord:
    return RequestRecord(
        request_id=0,
        session=None,
        slo_class="interactive",
        ttft_slo_s=0.5,
        tbt_slo_s=0.05,
        task_slo_s=None,
        arrival_s=10.0,
        input_tokens=100,
        output_tokens=10,
        first_token_s=None if ttft_s is None else 10.0 + ttft_s,
        finish_s=None if ttft_s is None else 20.0,
        mean_tbt_s=mean_s,
        **more,
    )


@pytest.mark.parametrize(
    ("ttft_s", "mean_s", "is_met"),
    [
        (0.5, 0.05, True),
        (0.51, 0.01, False),
        (0.1, 0.06, False),
        (0.1, None, True),
        (None, None, False),
    ],
)
def test_objectives_are_met_up_to_their_limit(
    ttft_s: float | None, mean_s: float | None, is_met: bool
) -> None:
    assert meets_slo(record(ttft_s, mean_s)) is is_met


def test_the_criterion_chooses_the_token_gap() -> None:
    found = record(0.1, 0.04, p99_tbt_s=0.05, max_tbt_s=0.2)
    assert meets_slo(found, "mean")
    assert meets_slo(found, "p99")
    assert not meets_slo(found, "max")
    with pytest.raises(ConfigError, match="mean"):
        meets_slo(found, "median")


def test_a_distribution_is_its_quantiles() -> None:
    values = [float(value) for value in range(1, 1001)]
    found = distribution([*values, None])
    assert found["n"] == 1000
    assert found["mean"] == pytest.approx(500.5)
    assert found["p99"] == pytest.approx(np.quantile(values, 0.99))
    assert len(found["cdf"]) == len(CDF_SHARES)
    assert (found["cdf"][0], found["cdf"][-1]) == (1.0, 1000.0)
    assert distribution([None])["mean"] is None


def test_spread_arrivals_stay_within_the_clock_and_in_order() -> None:
    requests = [call(index, 3.0 * (index // 10), [index]) for index in range(100)]
    spread = list(SpreadWorkload(recorded(requests), 3.0, seed=1).initial())
    arrivals = [request.arrival_s for request in spread]
    assert arrivals == sorted(arrivals)
    assert len(set(arrivals)) == 100
    for request in spread:
        delay_s = request.arrival_s - 3.0 * (request.request_id // 10)
        assert 0.0 <= delay_s < 3.0
    again = [request.arrival_s for request in SpreadWorkload(recorded(requests), 3.0, 1).initial()]
    assert arrivals == again


def test_sessions_end_after_their_first_turns() -> None:
    whole = Simulation(Agents(sessions=6).build(1), server()).run().records
    workload = FirstTurns(Agents(sessions=6).build(1), 3)
    for _ in range(2):  # `initial` starts anew
        cut = Simulation(workload, server()).run().records
        calls = Counter(record.session for record in whole)
        assert Counter(record.session for record in cut) == {
            session: min(3, n) for session, n in calls.items()
        }
    with pytest.raises(WorkloadError, match="at least 1"):
        FirstTurns(workload, 0)


def test_the_new_token_ratio_decays_to_its_least() -> None:
    ratio = NewTokenRatio(server())
    assert ratio.current == 0.7
    ratio.decay(300)
    assert ratio.current == pytest.approx((0.7 + 0.7 * 0.14) / 2)
    ratio.decay(10_000)
    assert ratio.current == pytest.approx(0.7 * 0.14)


def test_many_decode_passes_take_as_long_as_one_by_one() -> None:
    execution = Execution(server().costs())
    together = execution.decode_ends_s(5.0, 40_000, 30, 200)
    now_s, context = 5.0, 40_000
    for end_s in together:
        now_s += execution.iteration_s((), context, 30)
        context += 30
        assert end_s == pytest.approx(now_s, rel=1e-9)


def test_noise_has_mean_one_and_follows_the_seed() -> None:
    quiet = Execution(server().costs()).iteration_s((), 10_000, 10)
    noisy = Execution(server().costs(), noise=0.2, seed=3)
    drawn = [noisy.iteration_s((), 10_000, 10) for _ in range(4000)]
    assert np.mean(drawn) == pytest.approx(quiet, rel=0.02)
    assert np.std(np.log(drawn)) == pytest.approx(0.2, rel=0.1)
    again = Execution(server().costs(), noise=0.2, seed=3)
    assert again.iteration_s((), 10_000, 10) == drawn[0]


class TestResultFiles:
    def run(self) -> dict[str, object]:
        result, _ = simulate(random_requests(1, 30), server())
        return {
            "labels": {"name": "fcfs"},
            "workload": {
                "spec": "test",
                "name": "test",
                "block_tokens": 64,
                "rate": 1.0,
                "seed": 0,
            },
            "settings": {"model": "m", "device": "d", "policy": "fcfs", "eviction": "lru"},
            **summarize(result),
        }

    def test_what_is_written_is_read_again(self, tmp_path: Path) -> None:
        run = self.run()
        schema.write_results(tmp_path / "a.json", [run])
        (found,) = schema.read_results(tmp_path / "a.json")["runs"]
        assert found["ttft_s"]["p99"] == pytest.approx(run["ttft_s"]["p99"], rel=1e-5)

    @pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 2, "runs": []}'])
    def test_other_files_are_refused_in_one_sentence(self, text: str, tmp_path: Path) -> None:
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(ConfigError, match="no result file"):
            schema.read_results(tmp_path / "a.json")

    def test_a_missing_file_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="can't be read"):
            schema.read_results(tmp_path / "a.json")

    def test_a_run_without_figures_is_not_written(self, tmp_path: Path) -> None:
        run = self.run()
        del run["goodput_rps"]
        with pytest.raises(Exception, match="goodput_rps"):
            schema.write_results(tmp_path / "a.json", [run])

    def test_comparing_shows_ratios(self) -> None:
        run = self.run()
        twice = json.loads(json.dumps(run))
        twice["ttft_s"]["mean"] *= 2
        row = tables.comparison_table([run], [twice]).splitlines()[2]
        assert row.split(" | ")[1:4] == ["1.000", "1.000", "2.000"]
