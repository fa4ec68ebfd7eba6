"""scripts/lib/environment.sh finds or gets Python, uv and room, or says in a sentence what to do.

Interpreters, uv, df and the like are stand-ins on PATH that write down how they were called, so
nothing is downloaded.
"""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest

LIBRARY = Path(__file__).parents[2] / "scripts" / "lib" / "environment.sh"
TOOLS = (
    *(
        "awk",
        "basename",
        "bash",
        "cat",
        "cp",
        "cut",
        "chmod",
        "dirname",
        "du",
        "env",
        "flock",
        "id",
    ),
    *("mkdir", "mktemp", "rm", "sha256sum", "stat", "uname"),
)

#: Knows which version it is (VERSION), and has what HAS lists: pip, venv, and whether pip finds uv.
PYTHON = """#!/bin/bash
echo "python$VERSION $*" >>"$CALLS"
has() { [[ " $HAS " == *" $1 "* ]]; }
case "$*" in
    *"(3, 11) <= sys.version_info"*) [[ $VERSION == 3.11 || $VERSION == 3.12 ]] ;;
    "-m pip --version") has pip ;;
    "-m ensurepip") has venv ;;
    *"import ensurepip, venv"*) has venv ;;
    "-m pip install "*" --target "*)
        has pip && has uv && mkdir -p "${*: -2:1}/bin" && cp "$STUBS/uv" "${*: -2:1}/bin/uv" ;;
    "-m pip install "*" uv")
        has uv && cp "$STUBS/uv" "$(dirname "$0")/uv" ;;
    "-m pip install "*) ;;
    "-m venv "*)
        has venv && mkdir -p "${*: -1}/bin" && cp "$0" "${*: -1}/bin/python" ;;
    *get_demo_model*) echo made >>"$CALLS" ;;
    "-m pytest "*) [[ -z ${FAILS:-} || $* != *"$FAILS"* ]] ;;
esac
"""
#: Makes environments of an interpreter that it is given; PYTHONS is what it can get by itself.
UV = """#!/bin/bash
echo "uv $*" >>"$CALLS"
case "$1 ${2:-}" in
    "--version "*) ;;
    "cache dir") echo "$UV_CACHE" ;;
    "venv "*)
        wanted=$(sed -E 's/.*--python ([^ ]+).*/\\1/' <<<"$*")
        if [[ $wanted == /* ]]; then source=$wanted
        elif [[ " $PYTHONS " == *" $wanted "* ]]; then source=$STUBS/python$wanted
        else echo "error: No interpreter found for Python $wanted" >&2; exit 2; fi
        mkdir -p "${*: -1}/bin" && cp "$source" "${*: -1}/bin/python" ;;
    "pip install") [[ -z ${UV_FAILS:-} ]] ;;
esac
"""


@dataclass
class Host:
    """A machine on which only the stand-ins and a few tools exist."""

    root: Path
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.path, self.stubs = self.root / "path", self.root / "stubs"
        self.path.mkdir()
        self.stubs.mkdir()
        for name in (*TOOLS, "sed"):
            found = shutil.which(name)
            assert found is not None, name
            (self.path / name).symlink_to(found)
        self.script(self.path / "df", 'echo h; echo "fs 1 1 $((99 * 1024 * 1024)) 1% /"')
        self.script(self.stubs / "uv", UV)
        self.calls_file = self.root / "calls"
        self.calls_file.touch()
        self.venv = self.root / "venv"
        (self.root / "home").mkdir()
        self.environment |= {
            "PATH": str(self.path),
            "HOME": str(self.root / "home"),
            "STUBS": str(self.stubs),
            "CALLS": str(self.calls_file),
            "TIERED_KV_VENV": str(self.venv),
            "UV_CACHE": str(self.root / "home" / "uv"),
            "PYTHONS": "",
            "PROGRAM": "serve",
            "CUDA_VISIBLE_DEVICES": "",
        }
        self.python("3.12", on_path=False)

    def script(self, path: Path, text: str) -> None:
        path.write_text(text if text.startswith("#!") else f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)

    def python(
        self, version: str, *names: str, has: str = "pip venv uv", on_path: bool = True
    ) -> None:
        text = PYTHON.replace("\n", f"\nVERSION={version} HAS='{has}'\n", 1)
        folder = self.path if on_path else self.stubs
        for name in names or (f"python{version}",):
            self.script(folder / name, text)

    def uv_on_path(self) -> None:
        shutil.copy(self.stubs / "uv", self.path / "uv")

    def ensure(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        program = f'set -euo pipefail; source "{LIBRARY}"; ensure_environment "$@"; echo "$PYTHON"'
        return subprocess.run(
            ["bash", "-c", program, "bash", *(arguments or ("demo",))],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def installs(self) -> list[str]:
        """The calls that made an environment and installed into it."""
        wanted = ("uv venv", "uv pip install", " -m venv ", " -m pip install")
        calls = self.calls_file.read_text().splitlines()
        return [call for call in calls if any(name in call for name in wanted)]

    def tests(self) -> list[str]:
        """What pytest was told, but for what it is told each time."""
        calls = self.calls_file.read_text().splitlines()
        return [call.partition(" --durations=15 ")[2] for call in calls if "-m pytest " in call]


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def refusal(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 1
    (line,) = [line for line in result.stderr.splitlines() if "error: " in line and "serve" in line]
    return line


def test_a_python_that_fits_is_used_by_uv(host: Host) -> None:
    host.python("3.11", "python3.11", "python3")
    result = host.ensure()
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(host.venv / "bin" / "python")
    get_uv, venv, install = host.installs()
    assert f"--target {host.venv}/.uv uv" in get_uv
    assert f"--python {host.path}/python3.11 {host.venv}" in venv
    assert install.startswith("uv pip install")
    host.calls_file.write_text("")
    assert host.ensure().returncode == 0
    assert host.installs() == []


def test_the_release_of_sglang_that_is_wanted_is_installed(host: Host) -> None:
    host.python("3.12")
    assert host.ensure().returncode == 0
    assert "sglang==0.5.23 --editable" in host.installs()[-1]
    host.calls_file.write_text("")
    host.environment["TIERED_KV_SGLANG"] = "0.5.17"
    assert host.ensure().returncode == 0
    assert "sglang==0.5.17 --editable" in host.installs()[-1]
    host.environment["TIERED_KV_SGLANG"] = "0.5.18"
    assert "SGLang 0.5.18 is not supported: choose one of 0.5.17 0.5.23." in refusal(host.ensure())


def test_where_there_is_a_gpu_the_default_is_the_release_of_bundles_and_images(host: Host) -> None:
    """compgen looks for the files of devices."""
    for files, release in (("true", "0.5.17"), ("false", "0.5.23")):
        program = f'compgen() {{ {files}; }}; source "{LIBRARY}"; echo "$SGLANG $(default_venv)"'
        environment = {
            name: value for name, value in host.environment.items() if "CUDA" not in name
        }
        found = subprocess.check_output(["bash", "-c", program], env=environment, text=True)
        assert found == f"{release} {LIBRARY.parents[2] / '.venv'}\n"


def run_both(host: Host, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(LIBRARY.parents[1] / "test"), "--both", *arguments],
        env=host.environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_both_releases_are_tested_each_in_an_environment_of_its_own(host: Host) -> None:
    host.python("3.12")
    result = run_both(host, "-m", "not server")
    assert result.returncode == 0, result.stderr
    installs = [call.split(" --editable")[0] for call in host.installs() if "sglang==" in call]
    pythons = [host.venv / "bin" / "python", host.root / "venv-0.5.17" / "bin" / "python"]
    assert {call.split("--python ")[1] for call in installs} == {
        f"{pythons[0]} sglang==0.5.23",
        f"{pythons[1]} sglang==0.5.17",
    }
    assert host.tests() == ["-m not server"] * 2
    host.environment["TIERED_KV_PYTHON"] = str(pythons[0])
    refused = run_both(host)
    assert refused.returncode == 1
    assert "unset TIERED_KV_PYTHON" in refused.stderr


def test_of_the_other_release_a_part_is_tested(host: Host) -> None:
    host.python("3.12")
    result = run_both(host)
    assert result.returncode == 0, result.stderr
    of_all = [text for text in host.tests() if text.startswith("-m")]
    no_server = "-m not server and not long"
    assert sorted(of_all) == [
        f"{no_server} --ignore test/contract",
        f"{no_server} test/contract",
        "-m server and apart and not long",
        "-m server and not apart and not long",
    ]
    files = [word for text in host.tests() for word in text.split() if word.startswith("test/")]
    assert "test/integration/test_three_tiers.py" in files
    assert all((LIBRARY.parents[2] / name).exists() for name in files)
    assert "other_contracts| passed after " in result.stdout


@pytest.mark.parametrize("part", ["not long --ignore", "test/integration"])
def test_what_fails_fails_the_run_and_the_rest_is_tested(host: Host, part: str) -> None:
    host.python("3.12")
    host.environment["FAILS"] = part
    result = run_both(host)
    assert result.returncode == 1
    assert "failed: pytest" in result.stderr
    assert result.stdout.count("| FAILED after ") == 1
    assert len(host.tests()) == 6


def test_uv_on_path_is_not_installed_again(host: Host) -> None:
    host.python("3.12")
    host.uv_on_path()
    assert host.ensure().returncode == 0
    assert [call.split()[0] for call in host.installs()] == ["uv", "uv"]


@pytest.mark.parametrize("has", ["pip uv", "venv uv"])
def test_a_host_with_another_python_gets_one_that_fits_from_uv(host: Host, has: str) -> None:
    """uv comes by pip, or by an environment that has pip."""
    host.python("3.13", "python3", "python3.13", has=has)
    host.environment["PYTHONS"] = "3.12"
    result = host.ensure()
    assert result.returncode == 0, result.stderr
    assert "Python 3.12, from uv" in result.stderr
    assert any(call.startswith("uv venv") and "--python 3.12" in call for call in host.installs())
    assert (host.venv / "bin" / "python").read_text() == (host.stubs / "python3.12").read_text()


def test_no_python_at_all_but_uv(host: Host) -> None:
    host.uv_on_path()
    host.environment["PYTHONS"] = "3.12"
    assert host.ensure().returncode == 0


def test_a_python_without_the_venv_module_will_do_for_uv(host: Host) -> None:
    host.python("3.12", has="")
    host.uv_on_path()
    assert host.ensure().returncode == 0
    assert f"--python {host.path}/python3.12" in host.installs()[0]


def test_pip_stands_in_where_uv_cannot_be_had(host: Host) -> None:
    host.python("3.12", has="pip venv")
    assert host.ensure().returncode == 0
    *_, venv, install = host.installs()
    assert venv.endswith(f" -m venv {host.venv}")
    assert " -m pip install" in install
    assert "--editable" in install


def test_pip_stands_in_where_uv_cannot_install(host: Host) -> None:
    host.python("3.12")
    host.environment["UV_FAILS"] = "1"
    assert host.ensure().returncode == 0
    assert " -m pip install" in host.installs()[-1]
    assert "--editable" in host.installs()[-1]


@pytest.mark.parametrize("has", ["pip uv", "pip", "venv", ""])
def test_no_python_that_fits_and_none_from_uv(host: Host, has: str) -> None:
    host.python("3.13", "python3", has=has)
    message = refusal(host.ensure())
    assert "Python 3.11 or 3.12 is needed" in message
    assert "there is none on PATH, and uv could not get one" in message
    assert "TIERED_KV_PYTHON" in message
    assert not (host.venv / ".tiered_kv_installed").exists()


def test_a_python_without_venv_and_no_uv(host: Host) -> None:
    host.python("3.12", has="")
    message = refusal(host.ensure())
    assert "python3.12 cannot make a virtual environment, and uv could not either" in message
    assert "python3.12-venv" in message


def test_the_demo_model_is_made_meanwhile_if_it_is_wanted(host: Host) -> None:
    host.python("3.12")
    assert host.ensure("demo", "--with-demo-model").returncode == 0
    assert "made" in host.calls_file.read_text()


def test_without_need_no_demo_model_is_made(host: Host) -> None:
    host.python("3.12")
    assert host.ensure("demo").returncode == 0
    assert "made" not in host.calls_file.read_text()


DF = """[[ $2 == */home/uv ]] && free={cache} || free=99
echo h; echo "fs 1 1 $((free * 1024 * 1024)) 1% /"
"""
STAT = """[[ $3 == */home/uv ]] && echo 2 || echo 1"""


def cache_elsewhere(host: Host, free_gb: int, held_gb: int = 0) -> None:
    for name in ("df", "stat", "du"):
        (host.path / name).unlink()
    host.script(host.path / "df", DF.format(cache=free_gb))
    host.script(host.path / "stat", STAT)
    host.script(host.path / "du", f'echo "$(({held_gb} * 1024 * 1024)) $2"')


def test_no_room_where_the_environment_goes(host: Host) -> None:
    host.python("3.12")
    host.script(host.path / "df", 'echo h; echo "fs 1 1 $((3 * 1024 * 1024)) 1% /"')
    message = refusal(host.ensure())
    assert "3 GB free" in message
    assert "TIERED_KV_VENV" in message


def test_no_room_for_uvs_cache_on_another_file_system(host: Host) -> None:
    host.python("3.12")
    cache_elsewhere(host, free_gb=4)
    message = refusal(host.ensure())
    assert f"{host.root}/home/uv, has 4 GB free" in message
    assert "UV_CACHE_DIR" in message


def test_what_uvs_cache_holds_already_needs_no_room(host: Host) -> None:
    host.python("3.12")
    cache_elsewhere(host, free_gb=4, held_gb=9)
    assert host.ensure().returncode == 0


@pytest.mark.parametrize("home", [None, "/nowhere/at/all"])
def test_without_a_home_it_says_what_to_set(host: Host, home: str | None) -> None:
    host.python("3.12")
    del host.environment["HOME"]
    if home is not None:
        host.environment["HOME"] = home
    message = refusal(host.ensure())
    assert "TIERED_KV_CACHE_DIR" in message
    host.environment["TIERED_KV_CACHE_DIR"] = str(host.root / "cache")
    assert host.ensure().returncode == 0


def test_an_environment_of_ones_own_needs_a_home_too(host: Host) -> None:
    """FlashInfer writes to it as it is imported."""
    host.python("3.12")
    del host.environment["HOME"]
    host.environment["TIERED_KV_PYTHON"] = str(host.path / "python3.12")
    assert "TIERED_KV_CACHE_DIR" in refusal(host.ensure())
