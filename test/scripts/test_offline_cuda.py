"""What a server imports on an H200 is in the bundle, and gpu_check's flags are to its liking.

No GPU is needed: torch is made to say that there is one (`support/pretend_cuda.py`), in a process
that finds the bundle's packages, torch and Triton with what these require, and nothing else.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmark.gpu import answers, answers_more, systems, ttft
from benchmark.gpu.setting import Setting

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts" / "lib"))

from bundle.cli import bundled_requirements  # noqa: E402
from bundle.packages import normalized  # noqa: E402

#: What torch and Triton require, and no package of SGLang's whose name begins alike.
HOST = re.compile(
    r"torch|triton|filelock|fsspec|jinja2|markupsafe|mpmath|networkx|setuptools|sympy"
    r"|typing-extensions|cuda-(bindings|pathfinder|toolkit)|nvidia-(cublas|cuda-(cupti|nvrtc|runtime)"
    r"|cudnn-cu13|cufft|cufile|curand|cusolver|cusparse|cusparselt-cu13|nccl-cu13|nvjitlink"
    r"|nvshmem-cu13|nvtx)"
)
#: Of the driver, what `sgl_kernel` is linked to.
DRIVER = "int cuInit(unsigned flags) { return 100; } int cuPointerGetAttribute() { return 100; }"

BUNDLED = {normalized(r.name): r.version for r in bundled_requirements()}

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(
        metadata.version("sglang") != BUNDLED["sglang"], reason="the bundle has another SGLang"
    ),
]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of links to the packages that there would be."""
    folder = tmp_path_factory.mktemp("site")
    found = set()
    for package in metadata.distributions():
        name = normalized(package.metadata["Name"])
        if name not in BUNDLED and not HOST.fullmatch(name):
            continue
        found.add(name)
        for file in package.files or ():
            # Several packages share the folder `nvidia`; of others the topmost one will do.
            part = file if file.parts[0] == "nvidia" else Path(file.parts[0])
            target, source = folder / part, Path(str(package.locate_file(part)))
            if part.parts[0] in ("..", "__pycache__") or target.exists() or not source.exists():
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(source)
    assert set(BUNDLED) <= found
    # Its entry points; its files are this checkout's.
    (own,) = (path for path in metadata.files("sglang-tiered-kv") or () if path.name == "METADATA")
    for path in (
        Path(str(own.locate())).parent,
        *(ROOT / "python").glob("tiered_kv*"),
        ROOT / "sgl-kernel-ext" / "python" / "sgl_kernel_ext",
    ):
        (folder / path.name).symlink_to(path)
    return folder


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a libcuda.so.1 that says there is no device."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    folder = tmp_path_factory.mktemp("driver")
    command = [compiler, "-shared", "-fPIC", "-x", "c", "-", "-Wl,-soname,libcuda.so.1"]
    subprocess.run(
        [*command, "-o", str(folder / "libcuda.so.1")], input=DRIVER, text=True, check=True
    )
    return folder


@pytest.mark.parametrize("system", ["tiered", "hicache"])
def test_a_server_of_the_check_starts_with_the_bundle_alone(
    site: Path, driver: Path, tmp_path: Path, system: str
) -> None:
    setting = Setting(torch.device("cuda"), False, tmp_path)
    model = systems.write_model(tmp_path / "model", is_small=False)
    flags = systems.common_flags(setting, 64, answers.LARGE.device)
    flags += ttft.system_of(setting, system, ttft.LARGE_SIZES, tmp_path / "disk")["args"]
    if system == "tiered":
        flags += [*answers.AS_PLAIN, *answers_more.CASCADE, *answers_more.MAKE_WAY]
    environment = {
        **os.environ,
        "PYTHONPATH": str(site),
        "LD_LIBRARY_PATH": os.pathsep.join(
            filter(None, (str(driver), os.environ.get("LD_LIBRARY_PATH")))
        ),
        "HF_HUB_OFFLINE": "1",
    }
    program = ROOT / "test" / "support" / "pretend_cuda.py"
    # -S: nothing of this environment.
    result = subprocess.run(
        [sys.executable, "-S", "-W", "ignore", program, "--model-path", str(model), *flags],
        env=environment, cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-4000:]
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    assert found == {
        "device": "cuda",
        "attention_backend": "flashinfer",
        "decode_sizes": [1, 2, 4, 8, 12, 16],
        "prefill": "breakable",
        "prefill_sizes": [int(size) for size in systems.PREFILL_GRAPHS[1:]],
    }
