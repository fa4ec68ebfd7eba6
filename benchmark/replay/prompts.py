"""Prompts for traces that only have block ids: equal ids give equal text, of the right length.

Text is made of words that are one token each and that the tokenizer keeps apart, so a block of n
tokens is n words drawn by the block's id. What a server adds (a begin token, a chat template) is
taken off the front, so that the whole prompt has the length asked for and blocks stay in place.
"""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from tiered_kv.core.errors import TieredKVError
from tiered_kv.simulation.workload.request import Request

_WORD = re.compile(r"[Ġ▁][a-z]{2,8}")
_MOST_WORDS = 4096
_CACHED_BLOCKS = 1 << 14


class PromptError(TieredKVError):
    """Prompts of a known length can't be made with this tokenizer; one sentence for the user."""


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a `tokenizer.json` or in a model's directory. Raises PromptError."""
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exceptions
        raise PromptError(
            f"{file} holds no tokenizer ({error}); give the served model's directory."
        ) from None


class PromptMaker:
    """Makes prompts of exact lengths with one tokenizer."""

    def __init__(self, tokenizer: Tokenizer, block_tokens: int, seed: int = 0) -> None:
        """Raises PromptError if the tokenizer has too few words that stay one token each."""
        self._tokenizer = tokenizer
        self._block_tokens = block_tokens
        self._seed = seed
        self._words = self._single_token_words()
        # One cache per maker, not per class, so that it goes away with its maker.
        self._block = lru_cache(maxsize=_CACHED_BLOCKS)(self._drawn_block)

    def text(self, request: Request, overhead_tokens: int = 0) -> str:
        """The prompt of `request`, `overhead_tokens` shorter than its input, at the front.

        Blocks that the request doesn't name, at its end, are its own.
        """
        words: list[str] = []
        for block in request.blocks:
            words += self._block(block)
        missing = request.input_tokens - len(words)
        if missing > 0:
            words += self._draw(missing, 1, request.request_id)
        return "".join(words[min(overhead_tokens, request.input_tokens - 1) : request.input_tokens])

    def probe(self, n_tokens: int) -> str:
        """Any `n_tokens` tokens, the same each time."""
        return "".join(self._draw(n_tokens, 2, n_tokens))

    def count(self, text: str) -> int:
        """Tokens of `text`, without any that a server adds."""
        return len(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def check(self, request: Request, overhead_tokens: int = 0) -> None:
        """Raise PromptError unless the tokenizer makes as many tokens of the prompt as asked."""
        text = self.text(request, overhead_tokens)
        expected = max(1, request.input_tokens - overhead_tokens)
        found = self.count(text)
        if found != expected:
            raise PromptError(
                f"The tokenizer makes {found} tokens of {expected} words, so lengths would be "
                "wrong; use a byte-pair tokenizer that parts text at spaces."
            )

    def _drawn_block(self, block: int) -> list[str]:
        return self._draw(self._block_tokens, 0, block % (1 << 63))

    def _draw(self, n_words: int, kind: int, number: int) -> list[str]:
        rng = np.random.default_rng([self._seed, kind, number])
        chosen = rng.integers(0, len(self._words), n_words)
        return [self._words[index] for index in chosen]

    def _single_token_words(self) -> list[str]:
        vocabulary = self._tokenizer.get_vocab()
        candidates = sorted(token for token in vocabulary if _WORD.fullmatch(token))
        words = []
        for token in candidates:
            word = " " + token[1:]
            if self._tokenizer.encode(word, add_special_tokens=False).ids == [vocabulary[token]]:
                words.append(word)
            if len(words) == _MOST_WORDS:
                break
        if len(words) < 64:
            raise PromptError(
                f"The tokenizer has only {len(words)} plain words of one token; "
                "use one of a model for English text."
            )
        return words
