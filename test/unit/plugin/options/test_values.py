"""Option values as they arrive from the command line, from YAML and from Python.

Guarantee: what is accepted means the same whichever way it came; what isn't gives one sentence that
names the option.
"""

from __future__ import annotations

import errno
import os
import shutil
import threading
from pathlib import Path
from typing import NoReturn

import pytest

from tiered_kv.core.errors import ConfigError
from tiered_kv.plugin.options import values as option_values


@pytest.mark.parametrize(
    ("value", "n_bytes"),
    [
        ("8GB", 8 * 10**9),
        ("8", 8 * 10**9),
        (8, 8 * 10**9),
        (0.5, 5 * 10**8),
        ("512MB", 512 * 10**6),
        ("8GiB", 8 << 30),
        ("1.5g", 15 * 10**8),
        ("4096B", 4096),
    ],
)
def test_sizes(value: str | float, n_bytes: int) -> None:
    assert option_values.size_bytes("--size", value) == n_bytes


@pytest.mark.parametrize(
    "value", ["", "GB", "-1GB", "0", "8 apples", "nan", "inf", -3, True, "1e400"]
)
def test_a_size_that_is_none_is_refused_by_name(value: object) -> None:
    with pytest.raises(ConfigError, match=r"^--size must be a positive size, not .*8GiB\)\.$"):
        option_values.size_bytes("--size", value)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("value", "mode"),
    [("auto", "auto"), (None, "auto"), ("direct", "direct"), (" Buffered", "buffered")],
)
def test_disk_io_mode(value: str | None, mode: str) -> None:
    assert option_values.disk_io_mode("--io", value) == mode


def test_disk_io_mode_names_what_is_allowed() -> None:
    with pytest.raises(ConfigError, match="--io must be one of auto, direct, buffered, not 'on'"):
        option_values.disk_io_mode("--io", "on")


def test_key_file(tmp_path: Path) -> None:
    path = tmp_path / "key"
    with pytest.raises(ConfigError, match=r"--key-file names .*key, which is no file; write a key"):
        option_values.key_file("--key-file", path)
    path.touch()
    assert option_values.key_file("--key-file", str(path)) == path
    assert option_values.key_file("--key-file", None) is None


def test_numbers() -> None:
    assert option_values.number("--ratio", "2.5") == 2.5
    assert option_values.integer("--threads", "4") == 4
    with pytest.raises(ConfigError, match="--ratio must be a number, not 'two'"):
        option_values.number("--ratio", "two")
    with pytest.raises(ConfigError, match=r"--threads must be a whole number, not 1\.5"):
        option_values.integer("--threads", 1.5)  # type: ignore[arg-type]


def test_default_directory_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert option_values.disk_directory("--dir", None) == tmp_path / "tiered_kv" / "disk"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert option_values.disk_directory("--dir", None) == tmp_path / ".cache/tiered_kv/disk"


@pytest.mark.parametrize("value", ["none", "None", " NONE ", ""])
def test_none_switches_the_disk_off(value: str) -> None:
    assert option_values.disk_directory("--dir", value) is None


def test_a_relative_directory_is_made_absolute(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert option_values.disk_directory("--dir", "kv") == tmp_path / "kv"


def test_a_directory_beneath_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"^--dir cannot be .*file/kv because .*file is a file"):
        option_values.disk_directory("--dir", tmp_path / "file" / "kv")


def test_a_disk_that_is_at_fault_is_no_reason_to_refuse(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(*args: object) -> NoReturn:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        for what in ("exists", "is_dir"):
            patch.setattr(Path, what, broken)
        patch.setattr(shutil, "disk_usage", broken)
        directory = option_values.disk_directory("--dir", tmp_path / "kv")
        size = option_values.default_disk_bytes(tmp_path / "kv")
    assert directory == tmp_path / "kv"
    assert size == 32 * 10**9


def test_a_disk_that_hangs_does_not_hold_up_the_options(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    answers = threading.Event()
    monkeypatch.setattr(option_values, "_DISK_TIMEOUT_S", 0.05)
    monkeypatch.setattr(option_values, "_nearest_existing", lambda path: answers.wait() and path)
    try:
        assert option_values.disk_directory("--dir", tmp_path / "kv") == tmp_path / "kv"
        assert option_values.default_disk_bytes(tmp_path / "kv") == 32 * 10**9
    finally:
        answers.set()


def test_default_size_is_bounded_by_the_free_space(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def free(n_bytes: int) -> None:
        usage = shutil.disk_usage(tmp_path)._replace(free=n_bytes)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)

    missing = tmp_path / "a" / "b"
    free(10**12)
    assert option_values.default_disk_bytes(missing) == 32 * 10**9
    free(10**10)
    assert option_values.default_disk_bytes(missing) == 8 * 10**9
    free(0)
    assert option_values.default_disk_bytes(missing) == 256 * 10**6, "there may be room later"


def test_default_size_counts_what_the_tier_holds_already(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, n_bytes in (("shard-1-of-2", 1 << 20), ("shard-0-of-1", 5 << 20), ("else", 7 << 20)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "segment").write_bytes(os.urandom(n_bytes))
    usage = shutil.disk_usage(tmp_path)._replace(free=10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    size = option_values.default_disk_bytes(tmp_path)
    assert size == pytest.approx(0.8 * (10**9 + (6 << 20)), abs=20_000), "and nobody else's files"
