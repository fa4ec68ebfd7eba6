"""`python -m tiered_kv.disk`: what it prints, what it changes, and that it keeps off a running
server's directory."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from disk_builders import (
    MIB,
    NAMESPACE,
    PAGE_BYTES,
    disk_usage,
    flip,
    page_hash,
    read,
    segment_files,
    write,
)

from tiered_kv.disk import main
from tiered_kv.tiers.disk.record import BLOCK_BYTES
from tiered_kv.tiers.disk.store import DiskStore

OpenStore = Callable[..., DiskStore]
OTHER = hashlib.sha256(b"other").digest()


@pytest.fixture
def written(open_store: OpenStore, directory: Path) -> Path:
    store = open_store()
    write(store.namespace(NAMESPACE, PAGE_BYTES, "a model in bf16"), range(200))
    write(store.namespace(OTHER, 23_040, "another"), range(30))
    store.close()
    return directory


def damage_page_3(directory: Path) -> None:
    flip(segment_files(directory)[0], BLOCK_BYTES + 3 * (BLOCK_BYTES + PAGE_BYTES) + 5000)


def test_inspect_shows_a_table(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(written)]) == 0
    table = capsys.readouterr().out
    assert "in use by  nobody" in table
    assert "of 128 MiB" in table
    row = next(line for line in table.splitlines() if "a model in bf16" in line)
    assert row.split()[:6] == [NAMESPACE.hex()[:16], "200", "64", "KiB", "12.5", "MiB"]
    assert "another" in table


def test_inspect_beside_a_running_server(
    open_store: OpenStore, directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ns = open_store().namespace(NAMESPACE, PAGE_BYTES, "in service")
    write(ns, range(7))
    assert main(["inspect", str(directory)]) == 0
    table = capsys.readouterr().out
    assert "in use by  process " in table
    assert next(line for line in table.splitlines() if "in service" in line).split()[1] == "7"
    assert write(ns, range(7, 9)) == 2


def test_inspect_after_a_crash(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program = (
        "import os, sys; from pathlib import Path\n"
        "from tiered_kv.tiers.disk.store import DiskStore\n"
        "store = DiskStore.open(Path(sys.argv[1]), capacity_bytes=1 << 26)\n"
        "store.namespace(bytes(32), 4096).write_pages([bytes(32)], [memoryview(bytes(4096))])\n"
        "os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(directory)], check=False)
    assert main(["inspect", str(directory)]) == 0
    assert "0000000000000000      1" in capsys.readouterr().out


@pytest.mark.parametrize("command", [["verify"], ["gc"], ["clear", "--yes"]])
def test_other_commands_keep_off_a_running_server(
    open_store: OpenStore, directory: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    ns = open_store().namespace(NAMESPACE, PAGE_BYTES)
    write(ns, range(7))
    assert main([*command, str(directory)]) == 2
    assert "in use by process" in capsys.readouterr().err
    assert read(ns, range(7)) == 7


@pytest.mark.parametrize("command", [["inspect"], ["verify"], ["gc"], ["clear", "--yes"]])
def test_what_is_not_a_disk_tier_is_left_alone(
    tmp_path: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "precious").write_text("data")
    assert main([*command, str(tmp_path)]) == 2
    assert main([*command, str(tmp_path / "missing")]) == 2
    assert "is not a disk tier directory" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["precious"]


def test_system_errors_are_one_line(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (written / "FORMAT").unlink()
    (written / "FORMAT").mkdir()
    assert main(["verify", str(written)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"Cannot verify {written}: ")
    assert error.count("\n") == 1


def test_verify(open_store: OpenStore, written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(written)]) == 0
    assert "230 pages checked, 0 bad." in capsys.readouterr().out
    damage_page_3(written)
    for _ in range(2):
        assert main(["verify", str(written)]) == 1
        assert "230 pages checked, 1 bad (--repair drops them)." in capsys.readouterr().out
    assert main(["verify", "--repair", str(written)]) == 0
    assert "230 pages checked, 1 bad, 1 dropped." in capsys.readouterr().out
    assert main(["verify", str(written)]) == 0
    assert "229 pages checked, 0 bad." in capsys.readouterr().out
    ns = open_store().namespace(NAMESPACE, PAGE_BYTES)
    assert not ns.contains(page_hash(3))
    assert read(ns, range(4, 200)) == 196


def test_verify_rebuilds_a_damaged_index(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (written / "index.sqlite").write_bytes(b"nonsense" * 1000)
    assert main(["inspect", str(written)]) == 2
    assert "`verify` rebuilds it" in capsys.readouterr().err
    assert main(["verify", str(written)]) == 0
    assert "230 pages checked, 0 bad." in capsys.readouterr().out


def test_gc_shrinks(
    open_store: OpenStore, written: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = disk_usage(written)
    assert main(["gc", str(written)]) == 0
    assert main(["inspect", str(written)]) == 0
    assert "    200 " in capsys.readouterr().out
    assert main(["gc", "--capacity", "10MiB", str(written)]) == 0
    assert "given back" in capsys.readouterr().out
    assert disk_usage(written) <= 10 * MIB < before
    ns = open_store().namespace(NAMESPACE, PAGE_BYTES)
    kept = [seed for seed in range(200) if ns.contains(page_hash(seed))]
    assert kept
    assert read(ns, kept) == len(kept)


def test_gc_refuses_nonsense(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["gc", "--capacity", "much", str(written)])
    assert "is not a size" in capsys.readouterr().err


@pytest.mark.parametrize(("answer", "left"), [("y", 0), ("yes", 0), ("n", 230), ("", 230)])
def test_clear_asks(
    open_store: OpenStore, written: Path, monkeypatch: pytest.MonkeyPatch, answer: str, left: int
) -> None:
    questions = []
    monkeypatch.setattr("builtins.input", lambda question: questions.append(question) or answer)
    assert main(["clear", str(written)]) == 0
    assert "Delete all pages" in questions[0]
    assert open_store().stats().pages == left


def test_clear_without_a_terminal_deletes_nothing(written: Path, open_store: OpenStore) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "tiered_kv.disk", "clear", str(written)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0
    assert "Nothing was deleted" in run.stdout
    assert open_store().stats().pages == 230


def test_clear_gives_the_space_back(written: Path) -> None:
    assert main(["clear", "--yes", str(written)]) == 0
    assert segment_files(written) == []
    assert disk_usage(written) < 300_000
