"""What random histories of the forest are made of."""

from __future__ import annotations

from hypothesis import strategies as st

from support_forest.model import TIERS
from tiered_kv.forest.residency import Residency

# A prompt is a few of three pages that differ in their first or in their last token only, and a
# tail that fills no page. Few pages, so that prompts share prefixes.
SYMBOLS = st.lists(st.sampled_from([0, 0, 1, 2]), max_size=7).map(tuple)
GROWN = st.lists(st.sampled_from([0, 1, 2]), min_size=3, max_size=7).map(tuple)
ROOTS = st.integers(min_value=0, max_value=1)
CHOICE = st.integers(min_value=0, max_value=10**6)
CAP = st.none() | st.integers(-1, 8)
TIER = st.sampled_from(TIERS)
IN_TRANSFER = st.sampled_from([Residency.LOADING, Residency.WRITING_BACK])
SLOT_KIND = st.sampled_from(["list", "range", "numpy"])
