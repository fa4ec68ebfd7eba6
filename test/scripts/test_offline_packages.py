"""Which packages a bundle holds, and what of them: not what the host has, nor what nobody loads."""

from __future__ import annotations

import csv
import io
import re
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS / "lib"))

from bundle import cli, packages, trim  # noqa: E402
from bundle.download import find_wheel, platforms  # noqa: E402
from bundle.errors import BundleError  # noqa: E402
from bundle.packages import Requirement  # noqa: E402

from support.wheels import wheel  # noqa: E402


def test_what_nobody_loads_is_left_out() -> None:
    for name in (
        "xgrammar/lib/libxgrammar.a", "flashinfer/data/cutlass/examples/a.cu",
        "numpy/_core/tests/test_x.py", "tool-1.0.data/scripts/tool",
    ):  # fmt: skip
        assert not trim.is_used(name), name
    for name in (
        "sglang/test/ci.py", "flashinfer/data/cutlass/include/cute/arch.hpp", "numpy/testing/x.py",
        "flashinfer/data/cutlass/tools/util/include/x.h", "a-1.0.data/platlib/a/native.so",
        "transformers/models/latest/x.py",
    ):  # fmt: skip
        assert trim.is_used(name), name


KERNEL_FILES = {
    "sgl_kernel/__init__.py": b"import x\n",
    "sgl_kernel/sm90/common_ops.abi3.so": b"hopper",
    "sgl_kernel/sm100/common_ops.abi3.so": b"others",
    "sgl_kernel/flash_ops.abi3.so": b"large",
}


@pytest.mark.parametrize(("arch", "kept"), [("9.0a", "sm90"), ("8.0", "sm100"), ("10.0a", "sm100")])
def test_sgl_kernel_keeps_what_its_gpu_needs(tmp_path: Path, arch: str, kept: str) -> None:
    source = wheel(tmp_path / "in", "sglang_kernel", KERNEL_FILES, "cp310-abi3-linux_x86_64")
    target = tmp_path / source.name
    trim.trim_wheel(source, target, trim.is_needed_of_sgl_kernel(arch))
    with zipfile.ZipFile(target) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        assert names == {"sgl_kernel/__init__.py", f"sgl_kernel/{kept}/common_ops.abi3.so"}
        rows = list(csv.reader(io.StringIO(archive.read(f"{DIST_INFO}/RECORD").decode())))
        assert {row[0] for row in rows} == set(archive.namelist())
        for name, digest, size in rows:
            if digest:
                data = archive.read(name)
                assert (digest, int(size)) == (trim.record_hash(data), len(data))


DIST_INFO = "sglang_kernel-1.0.dist-info"


def test_a_wheel_of_other_contents_is_not_trimmed_to_nothing(tmp_path: Path) -> None:
    source = wheel(tmp_path / "in", "sglang_kernel", {"other/file.so": b"x"})
    with pytest.raises(BundleError, match="Nothing of sglang_kernel"):
        trim.trim_wheel(source, tmp_path / source.name, trim.is_needed_of_sgl_kernel("9.0a"))


def test_what_the_host_has_is_left_out() -> None:
    requirements = packages.parse_requirements(
        "# comment\n\nexact==1.2\nrange==2.0  # host: >=1.5,<3\nopen==4  # host: >=4\nabsent==1\n"
    )
    assert [r.name for r in requirements] == ["exact", "range", "open", "absent"]

    def left(freeze: str) -> list[str]:
        host = packages.parse_freeze(freeze)
        return [r.name for r in packages.wanted(requirements, host)]

    assert left("exact==1.2+cu130\nRange==2.9\nopen==10.1\n") == ["absent"]
    assert left("exact==1.3\nrange==3.0\nopen==3.9\n") == ["exact", "range", "open", "absent"]
    assert left("") == ["exact", "range", "open", "absent"]
    with pytest.raises(BundleError, match="NAME==VERSION"):
        left("Package    Version\n")


def test_the_requirements_are_of_the_release_that_is_pinned() -> None:
    pins = {r.name: r.version for r in cli.bundled_requirements()}
    environment = (SCRIPTS / "lib" / "environment.sh").read_text()
    assert f"SGLANG_ON_GPUS={pins['sglang']} " in environment
    assert not {"torch", "triton"} & set(pins)
    if metadata.version("sglang") != pins["sglang"]:
        pytest.skip("what that release needs is known beside it alone")
    needed = "\n".join(metadata.requires("sglang") or [])
    exact = {
        packages.normalized(name): version
        for name, version in re.findall(r"^([\w-]+)(?:\[.*\])?==([\w.]+)", needed, re.MULTILINE)
    }
    for name in ("flashinfer-python", "sglang-kernel", "transformers", "xgrammar"):
        assert pins[name] == exact[name]


def test_the_wheel_for_the_hosts_python_is_found(tmp_path: Path) -> None:
    for tag in ("cp311-cp311-linux_x86_64", "cp313-abi3-linux_x86_64"):
        wheel(tmp_path, "native", {"native.py": b""}, tag)
    assert find_wheel(tmp_path, Requirement("native", "1.0"), "3.12") is None
    expected = wheel(tmp_path, "native", {"native.py": b""}, "cp39-abi3-linux_x86_64")
    assert find_wheel(tmp_path, Requirement("native", "1.0"), "3.12") == expected
    assert find_wheel(tmp_path, Requirement("native", "1.1"), "3.12") is None
    expected.write_bytes(expected.read_bytes()[:-30])  # a download that broke off
    assert find_wheel(tmp_path, Requirement("native", "1.0"), "3.12") is None


def test_no_platform_wants_a_newer_glibc_than_the_host_has() -> None:
    assert "manylinux_2_28_x86_64" in platforms(31)
    assert "manylinux_2_34_x86_64" not in platforms(31)
