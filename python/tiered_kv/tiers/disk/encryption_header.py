"""What an encrypted directory says of its encryption, which takes no cryptography to read."""

from __future__ import annotations

from typing import NamedTuple

AES = "AES-256-GCM"
CHACHA20 = "ChaCha20-Poly1305"


class EncryptionHeader(NamedTuple):
    """What an encrypted directory says about itself, in the clear."""

    cipher: str
    """AES or CHACHA20."""
    salt: bytes
    key_check: bytes
