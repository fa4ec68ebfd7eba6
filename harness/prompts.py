"""Prompts as token ids of exact lengths: English-like, the same for the same seed."""

from __future__ import annotations

import random
from functools import lru_cache
from pathlib import Path

_WHO = "The old captain,A young engineer,My neighbour,The quiet librarian,A travelling musician"
_DID = "repaired,borrowed,painted,described,lost,sold,hid,measured,forgot,praised"
_WHAT = (
    "a brass telescope,the blue bicycle,an unfinished map,seven letters,a wooden clock,the bridge"
)
_WHERE = "in Lisbon,near the harbour,behind the mill,at the market,on the hill,under the arcade"
_WHY = "because it rained,before the war,to win a bet,for no reason,out of love,by mistake"


def sentence(rng: random.Random) -> str:
    who, did, what, where, why = (
        rng.choice(words.split(",")) for words in (_WHO, _DID, _WHAT, _WHERE, _WHY)
    )
    return f"{who} {did} {what} {where} {why}, {rng.randrange(1000)} days ago."


def story(seed: object, n_sentences: int) -> str:
    rng = random.Random(str(seed))
    return " ".join(sentence(rng) for _ in range(n_sentences))


class PromptMaker:
    """Cuts stories into prompts of `n` tokens with the model's own tokenizer."""

    def __init__(self, model: Path) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        self.tokens = lru_cache(maxsize=4096)(self._tokens)

    def _tokens(self, seed: object, n: int) -> tuple[int, ...]:
        """`n` token ids. Different seeds differ within the first few tokens; a longer prompt of
        the same seed starts with the shorter one."""
        # A sentence has at least ten tokens.
        text = f"Story {seed}. " + story(seed, n // 10 + 1)
        ids = self._tokenizer.encode(text).ids
        assert len(ids) >= n
        return tuple(ids[:n])

    def decode(self, ids: tuple[int, ...]) -> str:
        return str(self._tokenizer.decode(list(ids)))
