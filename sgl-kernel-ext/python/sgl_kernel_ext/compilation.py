"""Compiles the kernels for GPUs that aren't there, and reports what a thread will need of them.

    python -m sgl_kernel_ext.compilation --out benchmark/results/kernel_compile.md

For each kernel as it is launched for two models' pools: registers of a thread, bytes spilled to its
stack, shared memory of a block, and how it loads from and stores to global memory, as NVIDIA's
assembler and the PTX say. It takes minutes; no GPU is touched.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from tqdm import tqdm  # type: ignore[import-untyped]
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sgl_kernel_ext.formats import BufferSpec, Format, Role
from sgl_kernel_ext.triton_plan import VECTOR_BYTES, Buffers, Launch, plan_launch

#: A100, H100 and H200, B200.
CAPABILITIES = (80, 90, 100)

#: Arguments of every kernel that aren't constants.
ARGUMENTS = {
    "table": "*i64",
    "pages": "*i64",
    "rows": "*i64",
    "data": "*u8",
    "row_stride": "i32",
    "first_byte": "i32",
}


@dataclass(frozen=True, slots=True)
class Case:
    """A launch worth compiling: an op on a pool's buffers of one kind."""

    pool: str
    buffers: Buffers
    to_pool: bool

    @property
    def name(self) -> str:
        op = "scatter" if self.to_pool else "gather"
        spec = self.buffers.spec
        return f"{op} {self.buffers.format} {spec.role}, {self.pool}"

    def launch(self) -> Launch:
        return plan_launch(
            self.buffers, to_pool=self.to_pool, has_rows=True, data_align=VECTOR_BYTES
        )


@dataclass(frozen=True, slots=True)
class Compiled:
    """What came of it; `loads` and `stores` are the forms of PTX instructions on global memory.

    is_exact: no multiplication is fused with an addition, no small number taken for zero.
    """

    registers: int
    stack_bytes: int
    shared_bytes: int
    num_warps: int
    loads: frozenset[str]
    stores: frozenset[str]
    is_exact: bool


#: Name, page size, heads and channels of a pool, and what a layer has.
POOLS = (
    ("Llama 3.1 8B", 64, 8, 128, (Role.KEY, Role.VALUE)),
    ("DeepSeek-V3 latent", 64, 1, 576, (Role.KEY,)),
)


def cases() -> Iterator[Case]:
    """Every kernel, each as often as its constants make it another; tokens first, bfloat16."""
    for pool, page_size, heads, channels, roles in POOLS:
        for format_ in Format:
            for role in roles:
                alike = format_ in (Format.RAW, Format.FP8) or format_ is Format.KITTY
                if role is Role.VALUE and alike:
                    continue  # compiled already: as keys, or as int2's values
                spec = BufferSpec(0, role, heads, channels, "bfloat16")
                strides = (heads * channels, channels, 1)
                buffers = Buffers(format_, page_size, spec, strides, VECTOR_BYTES)
                for to_pool in (False, True):
                    yield Case(pool, buffers, to_pool)


def compile_for(launch: Launch, capability: int) -> Compiled:
    """Compiles a launch for a compute capability, such as 90. Raises what Triton raises."""
    constants: dict[str, Any] = dict(launch.constants)
    source = ASTSource(
        fn=launch.kernel,
        signature=ARGUMENTS | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
        attrs={},
    )
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": launch.num_warps, "enable_fp_fusion": False},
    )
    registers, stack_bytes = resources(compiled.asm["cubin"])
    return Compiled(
        registers,
        stack_bytes,
        compiled.metadata.shared,
        launch.num_warps,
        instructions(compiled.asm["ptx"], "ld"),
        instructions(compiled.asm["ptx"], "st"),
        is_exact=re.search(r"\bfma\.|\.ftz\b", compiled.asm["ptx"]) is None,
    )


def instructions(ptx: str, kind: str) -> frozenset[str]:
    """The forms of global loads (ld) or stores (st): `b64`, `v4.b32`, ..."""
    return frozenset(re.findall(rf"\b{kind}\.global\.(\S+)", ptx))


def resources(cubin: bytes) -> tuple[int, int]:
    """(registers, stack bytes) of a thread. Spilled registers are the only thing on the stack."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump reports no registers; it said: {text.strip()}")
    return int(found[1]), int(found[2])


HEADINGS = (
    "kernel", "sm", "registers", "spilled, bytes", "shared, bytes", "warps", "loads", "stores",
)  # fmt: skip


def report(rows: list[tuple[Case, int, Compiled]]) -> str:
    """The table in Markdown."""
    lines = [
        "# Kernels as compiled",
        "",
        f"By Triton {triton.__version__}, without a GPU:",
        "`python -m sgl_kernel_ext.compilation --out benchmark/results/kernel_compile.md`.",
        "Registers and spilled bytes are a thread's, shared memory a block's. Loads and stores are",
        "the PTX instructions on global memory: elements and codes move by the wide ones, page",
        "numbers, addresses, scales and masks by the others.",
        "",
        "| " + " | ".join(HEADINGS) + " |",
        "|" + "---|" * len(HEADINGS),
    ]
    for case, capability, compiled in rows:
        cells = [
            case.name,
            capability,
            compiled.registers,
            compiled.stack_bytes,
            compiled.shared_bytes,
            compiled.num_warps,
            " ".join(sorted(compiled.loads)),
            " ".join(sorted(compiled.stores)),
        ]
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="write the table to this file, not to the screen")
    parser.add_argument(
        "--sm", type=int, nargs="+", default=list(CAPABILITIES), help="compute capabilities"
    )
    options = parser.parse_args()
    wanted = [(case, capability) for capability in options.sm for case in cases()]
    rows = [
        (case, capability, compile_for(case.launch(), capability))
        for case, capability in tqdm(wanted, leave=False)
    ]
    if options.out:
        options.out.write_text(report(rows))
    else:
        sys.stdout.write(report(rows))


if __name__ == "__main__":
    main()
