"""`~` in a path, for users that have a home and users that have none."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

import pytest

from tiered_kv.core.errors import ConfigError
from tiered_kv.core.paths import expand_user


def test_a_home_is_put_in_the_place_of_a_tilde(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert expand_user("--file", "~/x") == Path("/home/me/x")
    assert expand_user("--file", Path("a/~b")) == Path("a/~b")


def test_without_a_home_only_whole_paths_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(_uid: int) -> pwd.struct_passwd:
        raise KeyError

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    assert expand_user("--file", "/data/x") == Path("/data/x")
    with pytest.raises(ConfigError, match=r"^--file cannot be ~/x because that home is not known"):
        expand_user("--file", "~/x")
    with pytest.raises(ConfigError, match="write the whole path"):
        expand_user("--file", f"~no-such-user-{os.getpid()}/x")
