"""Content addresses: equal to the written definition, and different wherever KV would be.

Hashes outlive the process (they name pages on disk), so their values are fixed here literally.
"""

from __future__ import annotations

import hashlib
import struct
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiered_kv.forest import key
from tiered_kv.forest.key import TreeKey, namespace_hash, page_hash, page_hashes, tree_hash

ROOT = bytes(range(32))
FIRST = "4eda7b1d359ab209d87d382affa21fbea8bdaef5eaea4107dae09efc6da68f3e"
SECOND = "0d7ac9afe92c76527a323a0c58b27fb805a03e2d4e40fdf3d178d68d878eaa94"
NAMESPACE = "ac45f26c7c1a195a9c46936ddba1b8a4f3d47d1c12201e59ffce0388ff52e48c"
TOKENS = st.lists(st.integers(min_value=-(2**63), max_value=2**63 - 1), max_size=40)
PART = st.one_of(st.none(), st.text(max_size=4), st.binary(max_size=4), st.integers())
PARTS = st.lists(PART, max_size=4)
NAME = st.none() | st.binary(max_size=2)
TREES = st.builds(TreeKey, salt=NAME, extra_key=NAME, adapter=NAME)


def chain_by_definition(parent: bytes, tokens: list[int], page_size: int) -> list[bytes]:
    hashes = []
    for begin in range(0, len(tokens) - len(tokens) % page_size, page_size):
        page = tokens[begin : begin + page_size]
        parent = hashlib.sha256(parent + struct.pack(f"<{page_size}q", *page)).digest()
        hashes.append(parent)
    return hashes


@given(tokens=TOKENS, page_size=st.sampled_from([1, 3, 16]))
def test_chain_is_as_defined(tokens: list[int], page_size: int) -> None:
    expected = chain_by_definition(ROOT, tokens, page_size)
    assert page_hashes(ROOT, array("q", tokens), page_size) == expected


def test_values_do_not_change_between_releases() -> None:
    (first, second) = page_hashes(ROOT, array("q", [1, 2, 3, 4]), 2)
    assert first.hex() == FIRST
    assert second.hex() == SECOND
    assert namespace_hash("model", b"\x00\xff", 7).hex() == NAMESPACE


def test_one_page_continues_a_chain() -> None:
    tokens = array("q", range(8))
    first, second = page_hashes(ROOT, tokens, 4)
    assert page_hash(ROOT, tokens[:4]) == first
    assert page_hash(first, tokens[4:]) == second


def test_a_chain_may_be_computed_in_parts() -> None:
    tokens = array("q", range(12))
    whole = page_hashes(ROOT, tokens, 4)
    assert page_hashes(whole[0], tokens[4:], 4) == whole[1:]


def test_a_big_endian_machine_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = array("q", [1, -2, 3 << 40])
    swapped = array("q", tokens)
    swapped.byteswap()
    expected = page_hashes(ROOT, tokens, 1)
    monkeypatch.setattr(key, "_LITTLE_ENDIAN", False)
    assert page_hashes(ROOT, swapped, 1) == expected


@given(PARTS, PARTS)
def test_namespaces_differ_whenever_their_parts_do(
    one: list[str | bytes | int | None], other: list[str | bytes | int | None]
) -> None:
    assert (namespace_hash(*one) == namespace_hash(*other)) == (
        [(type(part), part) for part in one] == [(type(part), part) for part in other]
    )


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("ab", "c"), ("a", "bc")),
        (("a", "b"), ("b", "a")),
        (("a",), (b"a",)),
        (("1",), (1,)),
        (("a",), ("a", "")),
        ((), ("",)),
        (("a",), ("a", None)),
        ((None,), ("",)),
        (("a", None), (None, "a")),
    ],
)
def test_parts_that_could_be_confused_are_not(
    one: tuple[str | bytes | int | None, ...], other: tuple[str | bytes | int | None, ...]
) -> None:
    assert namespace_hash(*one) != namespace_hash(*other)
    assert len(namespace_hash(*one)) == 32


@given(TREES, TREES)
def test_trees_are_one_if_all_that_names_them_is(one: TreeKey, other: TreeKey) -> None:
    assert (tree_hash(ROOT, one) == tree_hash(ROOT, other)) == (one == other)


def test_a_tree_is_named_by_its_namespace_too() -> None:
    assert tree_hash(ROOT, TreeKey()) != tree_hash(bytes(32), TreeKey())
