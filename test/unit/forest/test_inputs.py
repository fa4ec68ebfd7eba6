"""Images in the names of pages.

Guarantee: prompts share exactly the pages before the first place at which their tokens or what
stands behind them differ, however alike their placeholders are.
"""

from __future__ import annotations

from array import array

from hypothesis import given
from hypothesis import strategies as st

from tiered_kv.forest.forest import Forest
from tiered_kv.forest.inputs import LEAST_PAGE_TOKENS, TOKEN_LIMIT, Input, named, token_ids
from tiered_kv.forest.key import namespace_hash, page_hashes

#: The highest placeholder that SGLang has, and the one that all images here have.
PLACEHOLDER = 1_000_000 + (1 << 30) - 1
ROOT = namespace_hash("test")


def digest(name: object) -> bytes:
    return namespace_hash(str(name))


def hashes(tokens: array[int], inputs: list[Input], page_size: int) -> list[bytes]:
    return page_hashes(ROOT, named(tokens, inputs, page_size), page_size)


#: A prompt as parts: a text of so many tokens, or an image of (its name, its tokens).
PARTS = st.lists(
    st.one_of(st.integers(1, 40), st.tuples(st.sampled_from("abc"), st.integers(1, 40))),
    min_size=1,
    max_size=6,
)


def prompt(parts: list[int | tuple[str, int]]) -> tuple[array[int], list[Input], list[object]]:
    """Its tokens, its inputs, and what its KV is of, token by token."""
    tokens, inputs, truth = array("q"), [], []
    for part in parts:
        if isinstance(part, int):
            tokens.extend(range(part))
            truth += range(part)
        else:
            name, n = part
            # Behind an equal number of equal placeholders.
            inputs.append(Input(len(tokens), digest(part)))
            tokens.extend([PLACEHOLDER] * n)
            truth += [(name, n, i) for i in range(n)]
    return tokens, inputs, truth


@given(PARTS, PARTS, st.sampled_from((LEAST_PAGE_TOKENS, 16, 64)), st.booleans())
def test_prompts_share_the_pages_before_their_first_difference(
    some: list[int | tuple[str, int]],
    others: list[int | tuple[str, int]],
    page_size: int,
    is_extended: bool,
) -> None:
    if is_extended:
        others = some + others
    first, second = prompt(some), prompt(others)
    common = 0
    for one, other in zip(first[2], second[2], strict=False):
        if one != other:
            break
        common += 1
    expected = common // page_size
    found = [hashes(tokens, inputs, page_size) for tokens, inputs, _ in (first, second)]
    shared = sum(one == other for one, other in zip(*found, strict=False))
    assert shared == expected
    assert found[0][:shared] == found[1][:shared]


def test_a_tree_finds_a_prompts_own_image_only() -> None:
    forest = Forest(page_size=16)
    root = forest.root(ROOT)
    tokens = array("q", [*range(40), *[PLACEHOLDER] * 64, *range(40)])
    one, other = ([Input(40, digest(name))] for name in ("one", "other"))
    forest.insert(root, named(tokens, one, 16), list(range(144)))
    assert forest.match(root, named(tokens, one, 16)).n_tokens == 144
    assert forest.match(root, named(tokens, other, 16)).n_tokens == 32
    assert forest.match(root, tokens).n_tokens == 32
    forest.check_integrity(deep=True)


def test_a_turn_with_another_image_goes_on_from_the_first() -> None:
    tokens = array("q", [*range(40), *[PLACEHOLDER] * 64, *range(40)])
    first = [Input(40, digest("one"))]
    longer = tokens + array("q", [*range(40), *[PLACEHOLDER] * 64])
    second = [*first, Input(184, digest("two"))]
    assert hashes(tokens, first, 16) == hashes(longer, second, 16)[:9]
    swapped = [Input(40, digest("two")), Input(184, digest("one"))]
    assert hashes(longer, second, 16)[:2] == hashes(longer, swapped, 16)[:2]
    assert not {*hashes(longer, second, 16)[2:]} & {*hashes(longer, swapped, 16)[2:]}


def test_an_image_is_where_it_is() -> None:
    tokens = array("q", [PLACEHOLDER] * 16)
    names = [named(tokens, [Input(at, digest("one"))], 16) for at in range(16)]
    assert len({word.tobytes() for word in names}) == 16


def test_several_begin_on_one_page() -> None:
    tokens = array("q", [PLACEHOLDER] * 16)
    a, b = Input(0, digest("a")), Input(8, digest("b"))
    assert named(tokens, [a, b], 16) == named(tokens, [b, a], 16)
    assert len({named(tokens, some, 16).tobytes() for some in ([a, b], [a], [b], [])}) == 4


def test_the_rest_of_a_prompt_is_named_as_the_whole() -> None:
    tokens = array("q", [*range(40), *[PLACEHOLDER] * 64, *range(40)])
    inputs = [Input(40, digest("one")), Input(90, digest("two"))]
    whole = named(tokens, inputs, 16)
    for begin in range(0, 144, 16):
        assert named(tokens[begin:], inputs, 16, begin) == whole[begin:]


def test_tokens_are_told_from_names() -> None:
    tokens = array("q", [0, 5, TOKEN_LIMIT - 1, *[PLACEHOLDER] * 61])
    words = named(tokens, [Input(3, digest("one"))], 64)
    assert token_ids(words) == tokens.tolist()
    assert words[LEAST_PAGE_TOKENS:] == tokens[LEAST_PAGE_TOKENS:]
    assert min(words) >= 0
    assert tokens[0] == 0, "the engine's own tokens stay as they are"


def test_each_bit_of_a_digest_counts() -> None:
    tokens = array("q", [PLACEHOLDER] * 16)
    plain = digest("one")
    names = {named(tokens, [Input(0, plain)], 16).tobytes()}
    for bit in range(256):
        changed = (int.from_bytes(plain, "little") ^ 1 << bit).to_bytes(32, "little")
        names.add(named(tokens, [Input(0, changed)], 16).tobytes())
    assert len(names) == 257
