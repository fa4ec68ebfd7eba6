"""FlashInfer's and SGLang's kernels, built ahead: a folder of shared objects, and how they travel.

DIR/flashinfer/NAME/NAME.so becomes a package `flashinfer_jit_cache`, in which FlashInfer looks
before it compiles. DIR/tvm_ffi is content-addressed by SGLang and found through TVM_FFI_CACHE_DIR.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from bundle.errors import BundleError
from bundle.packages import Requirement
from bundle.trim import write_wheel

CHILD = Path(__file__).with_name("jit_child.py")
TVM_FOLDER = "jit/tvm_ffi"
PACKAGE = '''"""FlashInfer's kernels, built ahead for {names}."""

from pathlib import Path

__version__ = "{version}"


def get_jit_cache_dir() -> str:
    return str(Path(__file__).parent / "jit_cache")
'''


def cuda_home() -> Path:
    """The CUDA toolkit. Raises BundleError if there is none."""
    places = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    nvcc = shutil.which("nvcc")
    places += [str(Path(nvcc).resolve().parents[1])] if nvcc else []
    places += [str(path) for path in sorted(Path("/usr/local").glob("cuda*"), reverse=True)]
    for place in places:
        if place and is_toolkit(Path(place)):
            return Path(place)
    raise BundleError(
        "Kernels can't be built without nvcc and CUDA's headers; install the CUDA 13 toolkit or "
        "set CUDA_HOME, or leave --build-jit out."
    )


def is_toolkit(folder: Path) -> bool:
    return (folder / "bin/nvcc").is_file() and (folder / "include/cuda_runtime.h").is_file()


def driver_stub(folder: Path) -> Path:
    """A folder with a libcuda.so to link against; the driver's own is on the host.

    Raises BundleError without a C compiler.
    """
    folder.mkdir(parents=True, exist_ok=True)
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise BundleError("Kernels can't be built without a C compiler; install gcc and g++.")
    command = [compiler, "-shared", "-fPIC", "-x", "c", "/dev/null"]
    command += ["-Wl,-soname,libcuda.so.1", "-o", str(folder / "libcuda.so")]
    subprocess.run(command, check=True)
    return folder


def include_folders(python: str) -> list[str]:
    """Headers of CUDA libraries that the toolkit may lack: curand is in a wheel of torch's."""
    code = (
        "import pathlib, nvidia; "
        "print(*(str(i) for p in nvidia.__path__ for i in pathlib.Path(p).glob('*/include')), "
        "sep='\\n')"
    )
    found = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    return found.stdout.splitlines() if found.returncode == 0 else []


def build(folder: Path, python: str, arch: str, say: Callable[[str], object]) -> None:
    """Builds what `folder` lacks, with an interpreter that has SGLang. Raises BundleError."""
    home = cuda_home()
    check = [python, "-c", "import flashinfer, ninja, sglang, torch"]
    result = subprocess.run(check, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        last = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise BundleError(
            f"{python} can't build kernels ({last}); name an interpreter that has SGLang with "
            "--jit-python."
        )
    folder = folder.resolve()
    stub = driver_stub(folder / "stub")
    toolkit_libraries = [str(path) for path in (home / "lib64", home / "lib") if path.is_dir()]
    environment = {
        **os.environ,
        "CUDA_HOME": str(home),
        "PATH": os.pathsep.join((str(Path(python).parent), str(home / "bin"), os.environ["PATH"])),
        "FLASHINFER_EXTRA_LDFLAGS": " ".join(f"-L{x}" for x in (stub, *toolkit_libraries)),
        "LIBRARY_PATH": os.pathsep.join((str(stub), *toolkit_libraries)),
        "CPLUS_INCLUDE_PATH": os.pathsep.join(include_folders(python)),
    }
    say(f"building kernels for {arch} into {folder} with {home} (minutes; what is there stays)")
    command = [python, str(CHILD), str(folder), arch]
    if subprocess.run(command, env=environment, check=False).returncode != 0:
        raise BundleError(
            "Not all kernels could be built, see above; running this again goes on from there, and "
            f"--prebuilt-jit {folder} bundles those that are there."
        )


def files(folder: Path) -> list[tuple[str, Path]]:
    """(name in the bundle, path) of SGLang's modules. Raises BundleError if there are none."""
    if not folder.is_dir():
        raise BundleError(f"--prebuilt-jit {folder}: there is no such folder; see --build-jit.")
    tvm = folder / "tvm_ffi"
    found = [(f"{TVM_FOLDER}/{path.relative_to(tvm)}", path) for path in sorted(tvm.rglob("*.so"))]
    if not found and not list(folder.glob("flashinfer/*/*.so")):
        raise BundleError(f"{folder} holds no kernels; build them with --build-jit.")
    return found


def flashinfer_wheel(folder: Path, requirements: Sequence[Requirement], into: Path) -> Path:
    """A wheel of the package `flashinfer_jit_cache`, for the bundled FlashInfer."""
    libraries = sorted(folder.glob("flashinfer/*/*.so"))
    versions = [r.version for r in requirements if r.name == "flashinfer-python"]
    version = versions[0] if versions else "0"
    names = ", ".join(path.stem for path in libraries) or "nothing"
    package = "flashinfer_jit_cache"
    contents = {f"{package}/__init__.py": PACKAGE.format(names=names, version=version).encode()}
    for path in libraries:
        contents[f"{package}/jit_cache/{path.stem}/{path.name}"] = path.read_bytes()
    dist_info = f"{package}-{version}.dist-info"
    contents[f"{dist_info}/METADATA"] = (
        f"Metadata-Version: 2.1\nName: flashinfer-jit-cache\nVersion: {version}\n".encode()
    )
    contents[f"{dist_info}/WHEEL"] = (
        b"Wheel-Version: 1.0\nGenerator: offline_bundle\nRoot-Is-Purelib: false\n"
        b"Tag: py3-none-manylinux_2_28_x86_64\n"
    )
    wheel = into / f"{package}-{version}-py3-none-manylinux_2_28_x86_64.whl"
    write_wheel(wheel, dist_info, contents)
    return wheel
