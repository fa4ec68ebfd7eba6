"""scripts/offline_bundle: what is packed here is installed there, and nothing that was damaged.

Bundles are made of small wheels written here, and installed by the bundle's own `install`, in a
process of its own; nothing is downloaded.
"""

from __future__ import annotations

import io
import json
import os
import random
import subprocess
import sys
import tarfile
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS / "lib"))

from bundle import cli, install, jit, parts  # noqa: E402
from bundle.errors import BundleError  # noqa: E402
from bundle.packages import Requirement  # noqa: E402

from support.wheels import wheel  # noqa: E402

PART_BYTES = 64 << 10


def description(**changes: Any) -> dict[str, Any]:
    version = sys.version_info
    return {
        "schema": 1,
        "python": f"{version.major}.{version.minor}",
        "host": {"pytest": metadata.version("pytest")},
        "environment": {"KERNELS": "$PREFIX/jit"},
        "serve_flags": ["--port", "1"],
        "unpacked_bytes": 1000,
        "wheels": {},
        **changes,
    }


def noise(n_bytes: int, seed: int = 0) -> bytes:
    """That no archive makes smaller."""
    return random.Random(seed).randbytes(n_bytes)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A package and files in the first part, another package in several others."""
    first = wheel(tmp_path / "in", "first", {"first.py": b"value = 1\n"})
    rest = [
        wheel(
            tmp_path / "in",
            "second",
            {
                "second/__init__.py": b"value = 2\n",
                "second-1.0.data/platlib/second/native.so": b"\x7fELF",
                "second/noise.bin": noise(5 * PART_BYTES // 2),
                "second-1.0.data/scripts/tool": b"#!python\n",
            },
        ),
    ]
    source = tmp_path / "note.txt"
    source.write_bytes(noise(1000))
    check = tmp_path / "check"
    check.write_text('#!/bin/sh\nprintf "%s\\n" "$KERNELS" "$@"\n')
    check.chmod(0o755)
    others = [("source/note.txt", source), ("source/scripts/gpu_check", check)]
    out = tmp_path / "bundle"
    cli.write_bundle(
        out, PART_BYTES, [*cli.in_archive([first]), *others], cli.in_archive(rest), description()
    )
    return out


def run_install(bundle: Path, prefix: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(bundle / "install"), "--prefix", str(prefix)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def error_of(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 1, result.stderr
    assert "Traceback" not in result.stderr
    return result.stderr.splitlines()[-1]


def test_what_is_packed_is_installed(bundle: Path, tmp_path: Path) -> None:
    assert len(list(bundle.glob("rest.tar.xz.*"))) == 3
    prefix = tmp_path / "a place" / "prefix"
    result = run_install(bundle, prefix)
    assert result.returncode == 0, result.stderr
    assert str(prefix / "serve") in result.stdout
    assert (prefix / "source/note.txt").read_bytes() == (tmp_path / "note.txt").read_bytes()
    assert (prefix / "site/second/native.so").read_bytes() == b"\x7fELF"
    assert not list(prefix.rglob("tool"))
    serve = (prefix / "serve").read_text()
    assert '-m sglang.launch_server --tiered-kv --port 1 "$@"' in serve
    assert list((prefix / "site/second/__pycache__").glob("__init__.*.pyc"))
    code = (
        "import first, os, second; from importlib.metadata import version as v; "
        "print(first.value, second.value, v('first')); "
        "print(os.environ['no_proxy'], os.environ['KERNELS'])"
    )
    shell = f'. "{prefix}/env" && "$TIERED_KV_PYTHON" -c "{code}"'
    found = subprocess.run(
        ["sh", "-c", shell],
        env={**os.environ, "no_proxy": "intranet"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout == f"1 2 1.0\nintranet,127.0.0.1 {prefix}/jit\n"
    checked = subprocess.run(
        [prefix / "gpu_check", "--parts", "a b"], capture_output=True, text=True, check=True
    )
    assert checked.stdout == f"{prefix}/jit\n--parts\na b\n"


def test_the_first_part_is_enough_until_the_others_come(bundle: Path, tmp_path: Path) -> None:
    later = tmp_path / "later"
    later.mkdir()
    for path in bundle.glob("rest.tar.xz.*"):
        path.rename(later / path.name)
    prefix = tmp_path / "prefix"
    result = run_install(bundle, prefix)
    assert result.returncode == 0, result.stderr
    assert "nothing can be served before" in result.stderr
    assert "serve" not in result.stdout
    assert sorted(path.name for path in prefix.iterdir()) == [
        ".complete", "bundle.json", "env", "gpu_check", "site", "source",
    ]  # fmt: skip
    assert (prefix / "site/first.py").exists()
    (later / "rest.tar.xz.001").rename(bundle / "rest.tar.xz.001")
    assert "rest.tar.xz.000, rest.tar.xz.002 are missing" in error_of(run_install(bundle, prefix))
    for path in later.iterdir():
        path.rename(bundle / path.name)
    assert run_install(bundle, prefix).returncode == 0
    assert (prefix / "site/second/native.so").exists()
    assert (prefix / "serve").exists()


@pytest.mark.parametrize("prefix", [[], ["--prefix", "~/here"]])
def test_without_a_home_it_asks_for_a_whole_path(bundle: Path, prefix: list[str]) -> None:
    program = (
        "import pwd, runpy, sys\n"
        "def getpwuid(uid): raise KeyError(uid)\n"
        "pwd.getpwuid = getpwuid\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, str(bundle / "install"), *prefix],
        env={name: value for name, value in os.environ.items() if name != "HOME"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "give --prefix a whole path" in error_of(result)


def test_the_checksums_are_those_that_sha256sum_reads(bundle: Path) -> None:
    result = subprocess.run(
        ["sha256sum", "--check", "--strict", parts.CHECKSUMS_NAME],
        cwd=bundle, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout
    checked = {line.split(":")[0] for line in result.stdout.splitlines()}
    assert checked == {path.name for path in bundle.iterdir()} - {parts.CHECKSUMS_NAME}


def test_a_damaged_and_a_missing_part_are_named(bundle: Path, tmp_path: Path) -> None:
    damaged = bytearray((bundle / "rest.tar.xz.001").read_bytes())
    damaged[1000] ^= 1
    (bundle / "rest.tar.xz.001").write_bytes(damaged)
    (bundle / "rest.tar.xz.002").unlink()
    message = error_of(run_install(bundle, tmp_path / "prefix"))
    assert "rest.tar.xz.002 is missing and rest.tar.xz.001 is damaged" in message
    assert not (tmp_path / "prefix").exists()


def test_a_second_installation_replaces_the_first(bundle: Path, tmp_path: Path) -> None:
    prefix = tmp_path / "prefix"
    assert run_install(bundle, prefix).returncode == 0
    (prefix / "site/stale.py").touch()
    assert run_install(bundle, prefix).returncode == 0
    assert not (prefix / "site/stale.py").exists()
    assert [path.name for path in prefix.parent.iterdir() if path.name.startswith(".")] == []


def test_a_folder_of_something_else_is_left_alone(bundle: Path, tmp_path: Path) -> None:
    prefix = tmp_path / "precious"
    prefix.mkdir()
    (prefix / "thesis.tex").touch()
    assert "holds something else" in error_of(run_install(bundle, prefix))
    assert [path.name for path in prefix.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"python": "3.7"}, "is for CPython 3.7"),
        ({"host": {"no-such-package": "1"}}, "has no no-such-package"),
        ({"unpacked_bytes": 1 << 60}, "are needed"),
    ],
)
def test_a_host_that_does_not_fit_is_told_why(
    bundle: Path, tmp_path: Path, changes: dict[str, Any], text: str
) -> None:
    (bundle / install.DESCRIPTION_NAME).write_text(json.dumps(description(**changes)))
    names = [path for path in bundle.iterdir() if path.name != parts.CHECKSUMS_NAME]
    parts.write_checksums([(path.name, parts.sha256_of(path)) for path in names], bundle)
    assert text in error_of(run_install(bundle, tmp_path / "prefix"))


def test_an_archive_that_leads_outside_is_refused(tmp_path: Path) -> None:
    evil = tmp_path / "first.tar.xz"
    with tarfile.open(evil, "w:xz") as archive:
        archive.addfile(tarfile.TarInfo("../outside"), io.BytesIO())
    with pytest.raises(install.InstallError, match="outside"):
        install.unpack([[evil]], tmp_path / "a" / "prefix")
    assert not (tmp_path / "a" / "outside").exists()
    assert not (tmp_path / "a" / "prefix").exists()


def write_parts(folder: Path, n_bytes: int, part_bytes: int = PART_BYTES) -> list[tuple[str, str]]:
    """Parts whose second archive holds so many bytes."""
    (folder / "small").write_bytes(b"x")
    (folder / "file").write_bytes(noise(n_bytes))
    entries = [("a/file", folder / "file")]
    return parts.write_parts([("small", folder / "small")], entries, folder, part_bytes)


@pytest.mark.parametrize("n_bytes", [0, 1, PART_BYTES - 1024, 3 * PART_BYTES, 3 * PART_BYTES + 1])
def test_parts_joined_are_the_archive(tmp_path: Path, n_bytes: int) -> None:
    digests = write_parts(tmp_path, n_bytes)
    assert digests[0][0] == "first.tar.xz"
    paths = [tmp_path / name for name, _ in digests[1:]]
    assert paths == sorted(tmp_path.glob("rest.tar.xz.*"))
    sizes = [path.stat().st_size for path in paths]
    assert max(sizes) <= PART_BYTES
    # As few as will do, and of one size.
    assert len(sizes) == -(-sum(sizes) // PART_BYTES)
    assert max(sizes) - min(sizes) < len(sizes)
    assert [digest for _, digest in digests[1:]] == [parts.sha256_of(path) for path in paths]
    joined = io.BytesIO(b"".join(path.read_bytes() for path in paths))
    assert install.JoinedParts(paths).readall() == joined.getvalue()
    with tarfile.open(fileobj=joined, mode="r:xz") as archive:
        member = archive.extractfile("a/file")
        assert member is not None
        assert member.read() == (tmp_path / "file").read_bytes()


def test_equal_files_give_equal_parts(tmp_path: Path) -> None:
    first = write_parts(tmp_path, 1000)
    os.utime(tmp_path / "file", (1, 1))
    assert write_parts(tmp_path, 1000) == first


def test_fewer_parts_leave_none_of_the_older_ones(tmp_path: Path) -> None:
    assert len(write_parts(tmp_path, 4 * PART_BYTES)) == 6
    write_parts(tmp_path, 4 * PART_BYTES, 100 * PART_BYTES)
    assert sorted(path.name for path in tmp_path.glob("*.tar.xz*")) == [
        "first.tar.xz", "rest.tar.xz.000",
    ]  # fmt: skip


def test_parts_that_are_too_small_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="too small"):
        parts.write_parts([], [], tmp_path, 1000)
    (tmp_path / "file").write_bytes(noise(2 * PART_BYTES))
    with pytest.raises(BundleError, match="The first part takes"):
        parts.write_parts([("file", tmp_path / "file")], [], tmp_path, PART_BYTES)


@pytest.mark.parametrize(
    ("text", "n_bytes"), [("60MiB", 60 << 20), ("50 MB", 50_000_000), ("70000", 70_000)]
)
def test_sizes(text: str, n_bytes: int) -> None:
    assert cli.size_of(text) == n_bytes


def test_prebuilt_kernels_travel_where_their_users_look(tmp_path: Path) -> None:
    made = tmp_path / "jit"
    for path in ("flashinfer/page/page.so", "tvm_ffi/key/module.so", "work/left/over.o"):
        (made / path).parent.mkdir(parents=True)
        (made / path).write_bytes(b"\x7fELF")
    assert [name for name, _ in jit.files(made)] == ["jit/tvm_ffi/key/module.so"]
    built = jit.flashinfer_wheel(made, [Requirement("flashinfer-python", "0.6.15")], tmp_path)
    install.unpack_wheel(built, tmp_path / "site")
    code = (
        "import flashinfer_jit_cache as c, pathlib; print(c.__version__, "
        "(pathlib.Path(c.get_jit_cache_dir()) / 'page' / 'page.so').read_bytes())"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "site", capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert found.stdout == "0.6.15 b'\\x7fELF'\n"


def test_no_kernels_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no such folder"):
        jit.files(tmp_path / "nowhere")
    with pytest.raises(BundleError, match="holds no kernels"):
        jit.files(tmp_path)


def test_a_bundle_serves_with_flags_that_the_server_has(server_flags: set[str]) -> None:
    flags = {word for word in cli.SERVE_FLAGS if word.startswith("--")}
    assert flags
    assert flags <= server_flags


def test_help_names_the_way_from_here_to_there() -> None:
    result = subprocess.run(
        [sys.executable, str(SCRIPTS / "offline_bundle"), "--help"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0
    for text in ("--build-jit", "--host-packages", "./install --prefix"):
        assert text in result.stdout
