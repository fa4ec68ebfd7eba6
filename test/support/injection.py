"""Servers with a part that is broken on purpose: the environment that makes them so."""

from __future__ import annotations

from pathlib import Path

from support.python_path import ahead_on_path

INJECT = Path(__file__).with_name("inject")


def injected(names: str, **settings: object) -> dict[str, str]:
    """The environment for a Server in whose processes inject/`name`.py are at work.

    names: one, or several separated by commas.
    """
    for name in names.split(","):
        assert (INJECT / f"{name}.py").is_file(), name
    variables = {key: str(value) for key, value in settings.items()}
    return {"PYTHONPATH": ahead_on_path(INJECT), "TIERED_KV_TEST_INJECT": names, **variables}
