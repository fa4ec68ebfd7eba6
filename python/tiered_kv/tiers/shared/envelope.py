"""What goes around a page in a shared store, so that it can be believed.

A blob is a header and a body. The header says which page of which namespace it is, by its name
alone, and ends with a digest over itself and the payload: a checksum; with a cluster key a tag that
only holders of the key can make; with encryption the tag of the cipher, and the body is ciphertext.
Without the key neither names nor headers say whether a prompt that somebody guesses is there.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import struct
from dataclasses import dataclass

import xxhash

from tiered_kv.core.ids import PageHash
from tiered_kv.tiers.disk.encryption import AEAD_TAG_BYTES, PageCipher, new_cipher
from tiered_kv.tiers.disk.record import SALT_BYTES

MAGIC = b"TKVOBJ02"
#: magic, kind of digest, payload bytes, name, salt
_FIELDS = struct.Struct(f"<8sQQ32s{SALT_BYTES}s")
_DIGEST_BYTES = AEAD_TAG_BYTES
HEADER_BYTES = _FIELDS.size + _DIGEST_BYTES

_CHECKSUM, _TAG = 0, 1
_ENCRYPTED = 16
"""And more than this: the cipher's number."""
_NO_SALT = bytes(SALT_BYTES)


@dataclass(frozen=True, slots=True)
class StoreSecrets:
    """What the servers of a cluster have in common, and nobody else should."""

    key: bytes = b""
    """32 bytes, or none: then names and pages can be made, and pages read, by whoever reaches the
    store."""
    encrypts: bool = False


class Envelope:
    """Puts pages of `page_bytes` into blobs, and takes them out, for one namespace (32 bytes).

    Thread-safe.
    """

    def __init__(self, secrets: StoreSecrets, namespace_id: bytes, page_bytes: int) -> None:
        self.page_bytes = page_bytes
        self._namespace_id = namespace_id
        # Who encrypts and who does not share nothing: neither could read the other's pages.
        purpose = b"names of ciphertext" if secrets.encrypts else b"names"
        self._names_key = _derived(secrets.key, purpose)
        self._tags_key = _derived(secrets.key, b"tags") if secrets.key else None
        self._cipher: PageCipher | None = None
        if secrets.encrypts:
            self._cipher = new_cipher(_derived(secrets.key, b"pages"))

    @property
    def sealed_bytes(self) -> int:
        """Memory that a sealed page needs while it is made or opened; 0: it is the page itself."""
        return 0 if self._cipher is None else self.page_bytes + _DIGEST_BYTES

    def name(self, page_hash: PageHash) -> bytes:
        """32 bytes that stand for the page in this namespace."""
        return hmac.digest(self._names_key, self._namespace_id + page_hash, hashlib.sha256)

    def seal(
        self, name: bytes, payload: memoryview, header: memoryview, sealed: memoryview | None
    ) -> memoryview:
        """Fills `header`; returns the body: `payload` itself, or its ciphertext in `sealed`."""
        if self._cipher is None:
            kind = _CHECKSUM if self._tags_key is None else _TAG
            fields = self._fields(kind, name, _NO_SALT)
            header[:] = fields + self._digest(fields, payload)
            return payload
        assert sealed is not None
        salt = os.urandom(SALT_BYTES)
        fields = self._fields(_ENCRYPTED + self._cipher.encoding, name, salt)
        header[:] = fields + self._cipher.encrypt(fields, salt, payload, sealed)
        return sealed[: self.page_bytes]

    def open(
        self, name: bytes, header: memoryview, sealed: memoryview | None, payload: memoryview
    ) -> bool:
        """Whether this is that page, and `payload` holds it now.

        sealed: where the body is if it is ciphertext, with room for the tag; else it is in
        `payload`. After False `payload` may hold anything.
        """
        given = bytes(header[: _FIELDS.size])
        salt = given[-SALT_BYTES:]
        if self._cipher is None:
            kind = _CHECKSUM if self._tags_key is None else _TAG
            digest = bytes(header[_FIELDS.size :])
            return given == self._fields(kind, name, _NO_SALT) and hmac.compare_digest(
                digest, self._digest(given, payload)
            )
        assert sealed is not None
        if given != self._fields(_ENCRYPTED + self._cipher.encoding, name, salt):
            return False
        sealed[self.page_bytes :] = header[_FIELDS.size :]
        return self._cipher.decrypt(given, salt, sealed, payload)

    def _fields(self, kind: int, name: bytes, salt: bytes) -> bytes:
        return _FIELDS.pack(MAGIC, kind, self.page_bytes, name, salt)

    def _digest(self, fields: bytes, payload: memoryview) -> bytes:
        if self._tags_key is None:
            checksum = xxhash.xxh3_128(fields)
            checksum.update(payload)
            return checksum.digest()
        tag = hmac.new(self._tags_key, fields, hashlib.sha256)
        tag.update(payload)
        return tag.digest()[:_DIGEST_BYTES]


def _derived(key: bytes, purpose: bytes) -> bytes:
    return hmac.digest(key, b"tiered-kv shared store: " + purpose, hashlib.sha256)
