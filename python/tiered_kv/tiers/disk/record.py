"""Bytes on disk: the header blocks of segments and of page records.

A segment file is one header block, then records of one fixed size. A record is one header block,
then the page's payload, padded to whole blocks:

    [segment header 4096] ([record header 4096] [payload, padded to 4096])*

Headers carry their own checksum and that of the payload (XXH3-128, by PyPI `xxhash`, which hashes
tens of GB/s and releases the GIL); an encrypted payload has the cipher's tag instead. Integers are
little-endian.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import xxhash

from tiered_kv.tiers.alignment import ALIGNMENT_BYTES

BLOCK_BYTES = ALIGNMENT_BYTES
"""Alignment of everything: a multiple of what O_DIRECT asks of any common disk."""

FORMAT_VERSION = 1
ID_BYTES = 32

RECORD_MAGIC = b"TKVPAGE1"
SEGMENT_MAGIC = b"TKVSEGM1"

ENCODING_PLAIN = 0
"""The payload is the page itself. Other encodings get other numbers; a reader that does not know a
record's encoding treats the record as missing, never as page bytes."""
ENCODING_AES_256_GCM = 1
ENCODING_CHACHA20_POLY1305 = 2
"""The payload is encrypted, the payload's checksum is the cipher's tag: see `encryption`."""

DIGEST_BYTES = 16
SALT_BYTES = 16
# magic, version, encoding, payload bytes, sequence, namespace id, page hash, payload checksum
_RECORD = struct.Struct("<8sIIQQ32s32s16s")
# magic, version, generation, segment number, record bytes, slots
_SEGMENT = struct.Struct("<8sIIQQQ")
# Behind the record header's own checksum.
_SALT_OFFSET = _RECORD.size + DIGEST_BYTES


def checksum(data: memoryview | bytes) -> bytes:
    """16 bytes; for large buffers the GIL is released meanwhile."""
    return xxhash.xxh3_128_digest(data)


@dataclass(frozen=True, slots=True)
class RecordHeader:
    """What a record says about its payload."""

    namespace_id: bytes
    page_hash: bytes
    payload_bytes: int
    sequence: int
    payload_checksum: bytes
    encoding: int = ENCODING_PLAIN
    salt: bytes = bytes(SALT_BYTES)
    """What the record's key is derived from, if it is encrypted."""


@dataclass(frozen=True, slots=True)
class SegmentHeader:
    """What a segment file says about its slots."""

    number: int
    record_bytes: int
    slots: int
    generation: int = 0
    """How often the store had been cleared when the file was made."""


def pack_record(block: memoryview, header: RecordHeader) -> None:
    """Write a record header into the start of a 4096-byte block."""
    block[: _RECORD.size] = record_fields(header, header.payload_checksum)
    _seal(block, _RECORD.size)
    block[_SALT_OFFSET : _SALT_OFFSET + SALT_BYTES] = header.salt


def record_fields(header: RecordHeader, digest: bytes = bytes(DIGEST_BYTES)) -> bytes:
    """The header as it is stored but for seal and salt; with no digest, what a cipher
    authenticates (the salt is authenticated by being the key's)."""
    return _RECORD.pack(
        RECORD_MAGIC,
        FORMAT_VERSION,
        header.encoding,
        header.payload_bytes,
        header.sequence,
        header.namespace_id,
        header.page_hash,
        digest,
    )


def unpack_record(block: memoryview | bytes) -> RecordHeader | None:
    """The header in this block, or None if it is not one, is damaged or of another version."""
    if not _is_sealed(block, _RECORD.size):
        return None
    magic, version, encoding, payload_bytes, sequence, namespace_id, page_hash, digest = (
        _RECORD.unpack_from(block)
    )
    if magic != RECORD_MAGIC or version != FORMAT_VERSION:
        return None
    salt = bytes(block[_SALT_OFFSET : _SALT_OFFSET + SALT_BYTES])
    return RecordHeader(namespace_id, page_hash, payload_bytes, sequence, digest, encoding, salt)


def pack_segment(block: memoryview, header: SegmentHeader) -> None:
    """Write a segment header into the start of a 4096-byte block."""
    _SEGMENT.pack_into(
        block,
        0,
        SEGMENT_MAGIC,
        FORMAT_VERSION,
        header.generation,
        header.number,
        header.record_bytes,
        header.slots,
    )
    _seal(block, _SEGMENT.size)


def unpack_segment(block: memoryview | bytes) -> SegmentHeader | None:
    """The header in this block, or None if it is not one, is damaged or of another version."""
    if not _is_sealed(block, _SEGMENT.size):
        return None
    magic, version, generation, number, record_bytes, slots = _SEGMENT.unpack_from(block)
    if magic != SEGMENT_MAGIC or version != FORMAT_VERSION:
        return None
    return SegmentHeader(number, record_bytes, slots, generation)


def _seal(block: memoryview, size: int) -> None:
    block[size : size + DIGEST_BYTES] = checksum(block[:size])


def _is_sealed(block: memoryview | bytes, size: int) -> bool:
    end = size + DIGEST_BYTES
    return len(block) >= end and checksum(block[:size]) == bytes(block[size:end])
