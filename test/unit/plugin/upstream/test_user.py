"""A user without a name and a home gets both for SGLang's libraries, and no disk tier unasked."""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tiered_kv.core.errors import ConfigError
from tiered_kv.plugin.options import values
from tiered_kv.plugin.upstream import user

NAMES = ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME", "XDG_CACHE_HOME", user.TEMPORARY_HOME)


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """A process of a user that no password file knows, started with `--tiered-kv`."""

    def unknown(uid: int) -> pwd.struct_passwd:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    for name in NAMES:
        # Set first, so that what the code under test sets is taken back.
        monkeypatch.setenv(name, "x")
        monkeypatch.delenv(name)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["launch_server", "--tiered-kv"])
    return monkeypatch


@pytest.mark.parametrize("home", [None, "/nowhere/at/all"])
def test_a_name_and_a_home_are_made_up(
    nobody: pytest.MonkeyPatch, tmp_path: Path, home: str | None
) -> None:
    if home is not None:
        nobody.setenv("HOME", home)
    user.prepare()
    made = Path(os.environ["HOME"])
    assert os.environ["USER"] == str(os.getuid())
    assert made.parent == tmp_path
    assert made.stat().st_mode & 0o777 == 0o700
    user.prepare()
    assert os.environ["HOME"] == str(made)


def test_the_root_folder_is_a_home_only_for_who_may_write_it(nobody: pytest.MonkeyPatch) -> None:
    nobody.setenv("HOME", "/")
    nobody.setattr(os, "access", lambda *_: True)
    user.prepare()
    assert os.environ["HOME"] == "/"
    nobody.setattr(os, "access", lambda *_: False)
    user.prepare()
    assert os.environ["HOME"] != "/"


@pytest.mark.parametrize("trap", ["link", "open to all"])
def test_a_folder_that_somebody_else_can_reach_is_not_used(
    nobody: pytest.MonkeyPatch, tmp_path: Path, trap: str
) -> None:
    planted = tmp_path / f"tiered_kv_home_{os.getuid()}"
    if trap == "link":
        (tmp_path / "theirs").mkdir(mode=0o700)
        planted.symlink_to(tmp_path / "theirs")
    else:
        planted.mkdir()
        planted.chmod(0o777)
    user.prepare()
    assert os.environ["HOME"] != str(planted)
    assert Path(os.environ["HOME"]).stat().st_mode & 0o077 == 0


def test_nothing_is_touched_without_the_flag_or_with_a_home(
    nobody: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nobody.setattr(sys, "argv", ["launch_server"])
    user.prepare()
    assert not {"HOME", "USER"} & os.environ.keys()
    nobody.setattr(sys, "argv", ["launch_server", "--tiered-kv"])
    nobody.setenv("HOME", str(tmp_path))
    nobody.setenv("LOGNAME", "me")
    user.prepare()
    assert os.environ["HOME"] == str(tmp_path)
    assert "USER" not in os.environ
    assert values.disk_directory("--dir", None) == tmp_path / ".cache/tiered_kv/disk"


def test_nowhere_to_write_is_left_to_whoever_writes(nobody: pytest.MonkeyPatch) -> None:
    nobody.setattr(tempfile, "tempdir", "/nowhere/at/all")
    user.prepare()
    assert "HOME" not in os.environ


@pytest.mark.parametrize("is_prepared", [True, False])
def test_the_disk_tier_wants_to_be_told_where(
    nobody: pytest.MonkeyPatch, tmp_path: Path, is_prepared: bool
) -> None:
    """What should outlive the server has no place in a home that was made up."""
    if is_prepared:
        user.prepare()
    with pytest.raises(ConfigError, match=r"^--dir has no default because this user has no home"):
        values.disk_directory("--dir", None)
    assert values.disk_directory("--dir", "none") is None
    assert values.disk_directory("--dir", tmp_path) == tmp_path
    nobody.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert values.disk_directory("--dir", None) == tmp_path / "tiered_kv" / "disk"


def test_it_imports_nothing_that_could_fail_or_take_long() -> None:
    program = (
        "import sys, tiered_kv.plugin.upstream.user; print({'torch', 'sglang'} & {*sys.modules})"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "set()"
