"""Agents of benchmark/serving/agents.py, and what is made of their times."""

from __future__ import annotations

import pytest

from benchmark.serving.agents import CALLS, SYSTEMS, Call, Run, agents_of, row, table


def test_every_system_gets_the_same_agents_and_every_turn_others() -> None:
    agents = agents_of(6, "turn 1")
    assert agents == agents_of(6, "turn 1")
    assert not {agent.prompt for agent in agents} & {a.prompt for a in agents_of(6, "turn 2")}
    for agent in agents:
        assert CALLS[0] <= len(agent.answer_tokens) == len(agent.pauses_s) + 1 <= CALLS[1]


def test_only_one_way_of_asking_tells_programs_apart() -> None:
    first, second = agents_of(2, "turn 1")

    def sessions(name: str) -> list[object]:
        hints = SYSTEMS[name].hints
        calls = (hints(first, 0), hints(first, 1), hints(second, 0))
        return [call.get("session_id") for call in calls]

    assert sessions("slack unnamed") == sessions("fcfs") == [None] * 3
    assert len(set(sessions("slack single"))) == 3
    named = sessions("slack named")
    assert named[0] == named[1] != named[2]


def test_ratios_are_within_turns_and_texts_are_compared() -> None:
    def run(system: str, turn: int, seconds: float, text: str) -> Run:
        call = Call(seconds / 2, seconds, 100, 40, 30, 20)
        return Run(system, turn, [seconds, seconds], [call], [text, "same"])

    runs = [run("fcfs", 1, 2.0, "a"), run("fcfs", 2, 20.0, "b")]
    runs += [run("slack named", 1, 1.0, "a"), run("slack named", 2, 10.0, "other")]
    found = row("slack named", runs)
    assert found["task_by_fcfs"] == found["ttft_by_fcfs"] == pytest.approx(0.5)
    assert (found["equal"], found["tasks"]) == (3, 4)
    assert (found["device_share"], found["host_share"], found["disk_share"]) == (0.4, 0.3, 0.2)
    assert "| slack named | 5.5 | 5.5 | 10.0 | 0.50 " in table([found])
