"""Applying hooks and seeing whether they are in effect, on a module made up for the purpose.

Guarantee: `verify_installed` refuses whenever a call of the target would not run our function,
whatever other plugins did before or after us.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import pytest

from tiered_kv.core.errors import UpstreamError
from tiered_kv.plugin.hooks import table as hooks
from tiered_kv.plugin.hooks.table import Hook, Process

MODULE = "made_up_upstream"
REAL_TABLE = hooks.HOOKS
seen: list[Any] = []


def note(result: Any, *args: Any) -> None:
    """The hook: AFTER, changes nothing."""
    seen.append(result)


@pytest.fixture
def upstream(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A module with a class like SGLang's."""
    module = types.ModuleType(MODULE)

    class Scheduler:
        def step(self, n: int) -> int:
            return n + 1

        @classmethod
        def create(cls) -> str:
            return cls.__name__

    module.Scheduler = Scheduler  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, MODULE, module)
    return module


@pytest.fixture(autouse=True)
def table(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets the table of hooks for one test."""
    monkeypatch.setitem(sys.modules, "made_up_hooks", sys.modules[__name__])
    monkeypatch.setattr(hooks, "_installed", {})
    seen.clear()

    def use(*targets: str, process: Process = Process.SCHEDULER) -> None:
        rows = tuple(
            Hook(f"{MODULE}.{target}", "after", "made_up_hooks:note", process, "so")
            for target in targets
        )
        monkeypatch.setattr(hooks, "HOOKS", rows)

    use()
    return use


def install() -> None:
    hooks.install([Process.SCHEDULER])


def test_a_hook_runs_once_however_often_it_is_installed(
    table: Callable[..., None], upstream: types.ModuleType
) -> None:
    table("Scheduler.step")
    install()
    install()
    hooks.verify_installed(Process.SCHEDULER)
    assert upstream.Scheduler().step(1) == 2
    assert seen == [2]


def test_class_methods_stay_class_methods(
    table: Callable[..., None], upstream: types.ModuleType
) -> None:
    table("Scheduler.create")
    install()
    hooks.verify_installed(Process.SCHEDULER)
    assert upstream.Scheduler.create() == "Scheduler"
    assert seen == ["Scheduler"]


def test_nothing_is_touched_before_install(
    table: Callable[..., None], upstream: types.ModuleType
) -> None:
    table("Scheduler.step")
    step = upstream.Scheduler.step
    with pytest.raises(UpstreamError, match=r"hook on made_up_upstream\.Scheduler\.step is not in"):
        hooks.verify_installed(Process.SCHEDULER)
    assert upstream.Scheduler.step is step


def test_only_the_wanted_process_is_hooked(
    table: Callable[..., None], upstream: types.ModuleType
) -> None:
    table("Scheduler.step", process=Process.DETOKENIZER)
    install()
    hooks.verify_installed(Process.SCHEDULER)
    assert upstream.Scheduler().step(1) == 2
    assert seen == []


def test_a_missing_target_refuses(table: Callable[..., None], upstream: types.ModuleType) -> None:
    table("Scheduler.renamed")
    with pytest.raises(UpstreamError, match=r"Scheduler\.renamed cannot be hooked.*AttributeError"):
        install()


def test_a_function_of_ours_that_is_missing_refuses(
    monkeypatch: pytest.MonkeyPatch, upstream: types.ModuleType
) -> None:
    row = Hook(f"{MODULE}.Scheduler.step", "after", "made_up_hooks:gone", Process.SCHEDULER, "so")
    monkeypatch.setattr(hooks, "HOOKS", (row,))
    with pytest.raises(UpstreamError, match="cannot be hooked"):
        install()


def test_a_target_that_another_plugin_hooked_before_is_hooked_as_well(
    monkeypatch: pytest.MonkeyPatch, table: Callable[..., None], upstream: types.ModuleType
) -> None:
    registry = pytest.importorskip("sglang.srt.plugins.hook_registry").HookRegistry
    target = f"{MODULE}.Scheduler.step"
    monkeypatch.setattr(registry, "_hooks", type(registry._hooks)(list))
    monkeypatch.setattr(registry, "_patched", set())
    theirs: list[int] = []
    registry.register(target, lambda result, *args: theirs.append(result))
    registry.apply_hooks()
    assert target in registry._patched

    table("Scheduler.step")
    install()
    hooks.verify_installed(Process.SCHEDULER)
    upstream.Scheduler().step(1)
    assert (theirs, seen) == ([2], [2])


def test_being_wrapped_by_another_plugin_afterwards_is_fine(
    table: Callable[..., None], upstream: types.ModuleType
) -> None:
    registry = pytest.importorskip("sglang.srt.plugins.hook_registry")
    table("Scheduler.step")
    install()
    around = (registry.HookType.AROUND, lambda original, *args: original(*args), None)
    registry.HookRegistry._apply_target(f"{MODULE}.Scheduler.step", [around])
    hooks.verify_installed(Process.SCHEDULER)
    upstream.Scheduler().step(1)
    assert seen == [2]


def test_a_subclass_in_the_place_of_the_class_is_fine(
    table: Callable[..., None], upstream: types.ModuleType
) -> None:
    table("Scheduler.step")
    install()

    class Other(upstream.Scheduler):  # type: ignore[misc,name-defined]
        pass

    upstream.Scheduler = Other  # type: ignore[attr-defined]
    hooks.verify_installed(Process.SCHEDULER)


def test_being_replaced_by_another_plugin_refuses(
    table: Callable[..., None], upstream: types.ModuleType
) -> None:
    table("Scheduler.step")
    install()
    upstream.Scheduler.step = lambda self, n: n
    with pytest.raises(UpstreamError, match="may have replaced it: try SGLANG_PLUGINS=tiered_kv"):
        hooks.verify_installed(Process.SCHEDULER)


def test_the_real_table_gives_reasons_and_functions_that_exist() -> None:
    assert REAL_TABLE
    for hook in REAL_TABLE:
        assert hook.why
        assert hook.kind in ("before", "after", "around", "replace")
        assert callable(hooks._function(hook))
