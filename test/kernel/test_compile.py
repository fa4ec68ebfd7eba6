"""The kernels compile for GPUs that aren't here, spill nothing, and move elements by wide accesses.

What a thread loads or stores at once decides whether a copy reaches the memory's bandwidth, and is
easily lost: a pointer out of a table carries no alignment unless told. So the PTX is read.
"""

from __future__ import annotations

import os

import pytest
from triton.runtime.jit import JITFunction

from sgl_kernel_ext import triton_pack, triton_unpack
from sgl_kernel_ext.compilation import CAPABILITIES, Case, Compiled, cases, compile_for
from sgl_kernel_ext.formats import BufferSpec, Format, Role
from sgl_kernel_ext.triton_plan import Buffers

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled when interpreting"
    ),
]

CASES = list(cases())
USUAL = [c for c in CASES if c.pool == "Llama 3.1 8B"]
#: What takes part in a tile: addresses, page and row numbers; scales and zero points; mask bytes.
NARROW = {"b64", "b32", "b16", "b8"}


def check(case: Case, compiled: Compiled) -> None:
    """Elements move by 16 bytes a thread; so do codes, but 2-bit ones, of which 8 bytes suffice."""
    two_bits = case.buffers.format.code_bits == 2
    codes = {"v2.b32"} if two_bits else {"v4.b32"}
    in_pool, in_row = compiled.loads, compiled.stores
    if case.to_pool:
        in_pool, in_row = compiled.stores, compiled.loads
    assert "v4.b32" in in_pool
    assert codes <= in_row
    assert compiled.loads | compiled.stores <= NARROW | {"v2.b32", "v4.b32"}
    if case.to_pool:
        assert compiled.stores == {"v4.b32"}, "an element reaches the pool by a narrow store"
    if case.buffers.format is Format.RAW:
        assert compiled.loads == {"b64", "v4.b32"}, "b64 are table entries and indices"
        assert compiled.stores == {"v4.b32"}
    assert compiled.stack_bytes == 0, "registers are spilled"
    assert compiled.is_exact, "codes would differ from the reference's"


def test_no_kernel_is_left_out() -> None:
    """Whatever is launched takes a table of buffers first; it must be among the cases of sm_90."""
    launched = {case.launch().kernel for case in USUAL}
    for module in (triton_pack, triton_unpack):
        for name, kernel in vars(module).items():
            if isinstance(kernel, JITFunction) and kernel.arg_names[:1] == ["table"]:
                # Both modules have what finds a page, which kernels call.
                assert kernel in launched or name == "locate", name


@pytest.mark.parametrize("case", USUAL, ids=lambda case: case.name)
def test_on_sm_90(case: Case) -> None:
    check(case, compile_for(case.launch(), 90))


@pytest.mark.parametrize("capability", [80, 100])
@pytest.mark.parametrize("format_", [Format.RAW, Format.FP8])
@pytest.mark.parametrize("to_pool", [False, True], ids=["gather", "scatter"])
def test_on_others(format_: Format, to_pool: bool, capability: int) -> None:
    (case,) = (c for c in USUAL if c.buffers.format is format_ and c.to_pool is to_pool)
    check(case, compile_for(case.launch(), capability))


@pytest.mark.long
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_kernel_everywhere(case: Case, capability: int) -> None:
    check(case, compile_for(case.launch(), capability))


@pytest.mark.parametrize(
    ("strides", "align", "expected"),
    [
        ((1024, 128, 1), 8, "v2.b32"),  # the pool starts at an odd place
        ((1026, 128, 1), 16, "b32"),  # tokens are 2,052 bytes apart
        ((128, 128 * 4096, 1), 16, "v4.b32"),  # heads first
        ((2048, 128, 1), 16, "v4.b32"),  # keys and values interleaved
    ],
)
def test_strides_and_addresses_decide_the_width(
    strides: tuple[int, int, int], align: int, expected: str
) -> None:
    spec = BufferSpec(0, Role.KEY, 8, 128, "bfloat16")
    case = Case("strided", Buffers(Format.RAW, 16, spec, strides, align), to_pool=False)
    compiled = compile_for(case.launch(), 90)
    assert expected in compiled.loads
    assert compiled.loads <= {"b64", expected}
