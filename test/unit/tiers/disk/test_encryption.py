"""Encryption at rest: round trips, what lies on the disk, tampering, and whom it keeps out."""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from disk_builders import (
    MIB,
    NAMESPACE,
    PAGE_BYTES,
    aligned,
    filled,
    flip,
    page_hash,
    page_payload,
    read,
    readable,
    segment_files,
    write,
)

from tiered_kv import disk
from tiered_kv.core.errors import DiskTierError
from tiered_kv.tiers.disk import encryption, reclaimer
from tiered_kv.tiers.disk.encryption import PageCipher, cipher_of, new_header, read_key_file
from tiered_kv.tiers.disk.encryption_header import AES, CHACHA20
from tiered_kv.tiers.disk.io_path import IoMode
from tiered_kv.tiers.disk.record import BLOCK_BYTES, pack_record, unpack_record
from tiered_kv.tiers.disk.store import DiskStore

OpenStore = Callable[..., DiskStore]
KEY = hashlib.sha256(b"a key").digest()
OTHER_KEY = hashlib.sha256(b"another key").digest()
RECORD_BYTES = BLOCK_BYTES + PAGE_BYTES


@pytest.fixture(params=[AES, CHACHA20])
def cipher_name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ciphers, whatever this machine's CPU would make of it."""
    monkeypatch.setattr(encryption, "_has_aes_instructions", lambda: request.param == AES)
    return str(request.param)


@pytest.fixture
def written(open_store: OpenStore, directory: Path) -> Path:
    """A closed, encrypted directory with pages 0..29 in slots 0..29."""
    store = open_store(key=KEY)
    assert write(store.namespace(NAMESPACE, PAGE_BYTES), range(30)) == 30
    store.close()
    return directory


def reopened(open_store: OpenStore, **options: object) -> DiskStore:
    return open_store(key=KEY, **options)


# -- round trips


@pytest.mark.parametrize("page_bytes", [1, 100, 4095, 4096, 4097, 23_040, 1_000_001])
def test_round_trip(
    open_store: OpenStore, cipher_name: str, io_mode: IoMode, page_bytes: int
) -> None:
    ns = open_store(io_mode=io_mode, key=KEY).namespace(NAMESPACE, page_bytes)
    for length, seeds in ((ns.slot_bytes, range(9)), (page_bytes, range(20, 29))):
        hashes = [page_hash(seed) for seed in seeds]
        assert ns.write_pages(hashes, [filled(s, page_bytes, length) for s in seeds]) == 9
        targets = [aligned(length) for _ in seeds]
        assert ns.read_pages(hashes[::-1], targets) == 9
        for seed, target in zip(reversed(seeds), targets, strict=True):
            assert target[:page_bytes] == page_payload(seed, page_bytes)


def test_buffers_at_odd_addresses(open_store: OpenStore) -> None:
    """A read must not write past the view it was given, not even the cipher's tag."""
    page_bytes = 8192
    ns = open_store(key=KEY).namespace(NAMESPACE, page_bytes)
    area = aligned(3 * page_bytes)
    area[:] = b"\xee" * len(area)
    view = area[13 : 13 + page_bytes]
    view[:] = page_payload(1, page_bytes)
    assert ns.write_pages([page_hash(1)], [view]) == 1
    view[:] = bytes(page_bytes)
    assert ns.read_pages([page_hash(1)], [view]) == 1
    assert view == page_payload(1, page_bytes)
    assert area[:13] == b"\xee" * 13
    assert set(area[13 + page_bytes :]) == {0xEE}


def test_pages_survive_restart_reclaim_and_a_lost_index(
    open_store: OpenStore, directory: Path, cipher_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On a busy machine writers would not wait until hot pages were carried over.
    monkeypatch.setattr(reclaimer, "PATIENCE_S", 60.0)
    store = open_store(key=KEY, capacity_bytes=6 * MIB)
    ns = store.namespace(NAMESPACE, 12 << 10)
    hot = list(range(10))
    for seed in hot:
        write(ns, [seed, *range(100 * seed + 100, 100 * seed + 119)])
    for first in range(2000, 4000, 20):
        write(ns, range(first, first + 20))
        assert read(ns, hot) == 10
    assert store.stats().moved_pages > 0
    assert store.stats().checksum_failures == 0
    store.close()
    (directory / "index.sqlite").unlink()
    ns = open_store(key=KEY, capacity_bytes=6 * MIB).namespace(NAMESPACE, 12 << 10)
    assert read(ns, hot) == 10


# -- what is on the disk


def test_no_payload_in_the_clear(written: Path) -> None:
    everything = b"".join(p.read_bytes() for p in written.rglob("*") if p.is_file())
    assert len(everything) > 30 * PAGE_BYTES
    for seed in range(30):
        payload = page_payload(seed, PAGE_BYTES)
        assert all(payload[at : at + 16] not in everything for at in range(0, PAGE_BYTES, 4096))
    assert KEY not in everything
    assert KEY.hex().encode() not in everything


def test_equal_pages_look_different(open_store: OpenStore, directory: Path) -> None:
    """The same bytes under two names, and written twice: no salt, no ciphertext comes again."""
    store = open_store(key=KEY)
    ns = store.namespace(NAMESPACE, PAGE_BYTES)
    page = filled(1, PAGE_BYTES)
    for seed in range(20):
        ns.write_pages([page_hash(seed)], [page])
    store.clear()
    for seed in range(20):
        ns.write_pages([page_hash(seed)], [page])
    store.close()
    salts, blocks = set(), set()
    contents = segment_files(directory)[0].read_bytes()
    for slot in range(20):
        start = BLOCK_BYTES + slot * RECORD_BYTES
        header = unpack_record(contents[start : start + BLOCK_BYTES])
        assert header is not None
        salts.add(header.salt)
        blocks.add(contents[start + BLOCK_BYTES : start + 2 * BLOCK_BYTES])
    assert len(salts) == len(blocks) == 20
    assert bytes(16) not in salts


def test_two_directories_of_one_key_share_no_keys() -> None:
    one, two = new_header(KEY), new_header(KEY)
    assert one.salt != two.salt
    assert one.key_check != two.key_check
    sealed = memoryview(bytearray(4 + 16))
    cipher = cipher_of(one, KEY)
    other = cipher_of(two, KEY)
    assert cipher is not None
    assert other is not None
    cipher.encrypt(b"", bytes(16), memoryview(b"page"), sealed)
    assert cipher.decrypt(b"", bytes(16), sealed, memoryview(bytearray(4)))
    assert not other.decrypt(b"", bytes(16), sealed, memoryview(bytearray(4)))


# -- tampering: the checksums of an attacker are right


@pytest.mark.parametrize(
    "offset", [0, 16, 30, 70, 100, 120, 130, 143, BLOCK_BYTES, RECORD_BYTES - 1]
)
def test_flipped_byte_is_a_miss(open_store: OpenStore, written: Path, offset: int) -> None:
    """Header fields, tag, header checksum, salt, first and last byte of the payload."""
    flip(segment_files(written)[0], BLOCK_BYTES + 3 * RECORD_BYTES + offset)
    store = reopened(open_store)
    ns = store.namespace(NAMESPACE, PAGE_BYTES)
    assert readable(ns, range(8)) == [0, 1, 2, 4, 5, 6, 7]
    assert store.stats().checksum_failures == 1


def test_record_under_another_name_is_a_miss(open_store: OpenStore, written: Path) -> None:
    """Page 7's record with page 2's name written over its own, its header sealed again."""
    path = segment_files(written)[0]
    contents = path.read_bytes()
    start = BLOCK_BYTES + 7 * RECORD_BYTES
    header = unpack_record(contents[start : start + BLOCK_BYTES])
    assert header is not None
    block = aligned(BLOCK_BYTES)
    pack_record(block, dataclasses.replace(header, page_hash=page_hash(2)))
    with path.open("r+b") as file:
        file.seek(BLOCK_BYTES + 2 * RECORD_BYTES)
        file.write(bytes(block) + contents[start + BLOCK_BYTES : start + RECORD_BYTES])
    ns = reopened(open_store).namespace(NAMESPACE, PAGE_BYTES)
    assert readable(ns, range(10)) == [0, 1, 3, 4, 5, 6, 7, 8, 9]


# -- keys


def test_wrong_key_is_refused_and_loses_nothing(open_store: OpenStore, written: Path) -> None:
    before = {p: p.stat().st_size for p in written.rglob("*")}
    with pytest.raises(DiskTierError, match="The key is not the one that the pages in"):
        open_store(key=OTHER_KEY)
    assert {p: p.stat().st_size for p in written.rglob("*")} == before
    assert read(reopened(open_store).namespace(NAMESPACE, PAGE_BYTES), range(30)) == 30


def test_no_key_is_refused_and_loses_nothing(open_store: OpenStore, written: Path) -> None:
    with pytest.raises(DiskTierError, match="are encrypted: give the key file"):
        open_store()
    assert read(reopened(open_store).namespace(NAMESPACE, PAGE_BYTES), range(30)) == 30


def test_key_for_plain_pages_is_refused(open_store: OpenStore) -> None:
    store = open_store()
    write(store.namespace(NAMESPACE, PAGE_BYTES), range(3))
    store.close()
    with pytest.raises(DiskTierError, match="are not encrypted but a key was given"):
        open_store(key=KEY)
    assert read(open_store().namespace(NAMESPACE, PAGE_BYTES), range(3)) == 3


def test_other_versions_refuse_an_encrypted_directory(written: Path) -> None:
    """A release without encryption knows version 1 only."""
    assert json.loads((written / "FORMAT").read_text())["version"] == 2


@pytest.mark.parametrize("field", ["cipher", "salt", "key_check"])
def test_damaged_encryption_header(open_store: OpenStore, written: Path, field: str) -> None:
    """What the pages were encrypted with cannot be known any more."""
    contents = json.loads((written / "FORMAT").read_text())
    contents["encryption"][field] = "rot13!"
    (written / "FORMAT").write_text(json.dumps(contents))
    ns = reopened(open_store).namespace(NAMESPACE, PAGE_BYTES)
    assert len(ns) == 0
    assert write(ns, [1]) == read(ns, [1]) == 1


def test_stats_say_so(open_store: OpenStore, tmp_path: Path) -> None:
    assert open_store(key=KEY).stats().encrypted
    with DiskStore.open(tmp_path / "plain", capacity_bytes=8 * MIB) as store:
        assert not store.stats().encrypted


# -- key files


def key_file(directory: Path, contents: bytes, mode: int = 0o600) -> Path:
    path = directory / "key"
    path.write_bytes(contents)
    path.chmod(mode)
    return path


@pytest.mark.parametrize("contents", [KEY, KEY.hex().encode(), KEY.hex().upper().encode() + b"\n"])
def test_key_file_formats(tmp_path: Path, contents: bytes) -> None:
    assert read_key_file(key_file(tmp_path, contents)) == KEY


def test_raw_key_of_any_bytes(tmp_path: Path) -> None:
    """Thirty-two raw bytes are a key even if they happen to be text."""
    assert read_key_file(key_file(tmp_path, b"a" * 32)) == b"a" * 32


@pytest.mark.parametrize("contents", [b"", b"a" * 31, b"a" * 33, b"g" * 64, b"\xff" * 64, KEY * 9])
def test_files_that_are_no_keys(tmp_path: Path, contents: bytes) -> None:
    with pytest.raises(DiskTierError, match=r"holds no key of 32 bytes or 64 hexadecimal digits"):
        read_key_file(key_file(tmp_path, contents))


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o620, 0o601])
def test_key_file_of_others(tmp_path: Path, mode: int) -> None:
    with pytest.raises(DiskTierError, match=f"others than its owner .mode {mode:04o}.*chmod 600"):
        read_key_file(key_file(tmp_path, KEY, mode))


def test_missing_key_file(tmp_path: Path) -> None:
    with pytest.raises(DiskTierError, match="cannot be read"):
        read_key_file(tmp_path / "missing")
    with pytest.raises(DiskTierError, match="is not a file"):
        read_key_file(tmp_path)


# -- the tool


@pytest.mark.parametrize("command", [["verify"], ["gc"]])
def test_tool_needs_the_key(
    written: Path, tmp_path: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert disk.main([*command, str(written)]) == 2
    assert "are encrypted: give the key file" in capsys.readouterr().err
    wrong = key_file(tmp_path, OTHER_KEY)
    assert disk.main([*command, "--key-file", str(wrong), str(written)]) == 2
    assert "The key is not the one" in capsys.readouterr().err
    right = key_file(tmp_path, KEY)
    assert disk.main([*command, "--key-file", str(right), str(written)]) == 0


def test_tool_clears_without_the_key(written: Path, open_store: OpenStore) -> None:
    assert disk.main(["clear", "--yes", str(written)]) == 0
    with pytest.raises(DiskTierError, match="are encrypted"):
        open_store()
    assert open_store(key=KEY).stats().pages == 0


def test_tool_inspects_without_the_key(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert disk.main(["inspect", str(written)]) == 0
    table = capsys.readouterr().out
    assert f"encrypted  {json.loads((written / 'FORMAT').read_text())['encryption']['cipher']}" in (
        table
    )
    assert next(row for row in table.splitlines() if NAMESPACE.hex()[:16] in row).split()[1] == "30"


# -- keys and salts of records


def test_every_record_has_its_own_key() -> None:
    """HMAC-SHA256 of the salt, and GCM as NIST SP 800-38D has it: with a nonce of zeros the first
    block of the keystream is AES(record key, nonce || 2)."""
    cipher = PageCipher(AES, KEY)
    salt = bytes(range(16))
    record_key = hmac.digest(KEY, salt, "sha256")
    sealed = memoryview(bytearray(16 + 16))
    cipher.encrypt(b"", salt, memoryview(bytes(16)), sealed)
    encryptor = Cipher(algorithms.AES(record_key), modes.ECB()).encryptor()
    assert sealed[:16] == encryptor.update(bytes(12) + b"\x00\x00\x00\x02")


def test_salts_come_from_the_kernel(monkeypatch: pytest.MonkeyPatch, open_store: OpenStore) -> None:
    """A fork or a restored snapshot must not repeat them: no generator with a state of its own."""
    drawn: list[bytes] = []
    kernel = os.urandom

    def counting(n: int) -> bytes:
        drawn.append(kernel(n))
        return drawn[-1]

    ns = open_store(key=KEY).namespace(NAMESPACE, PAGE_BYTES)
    monkeypatch.setattr("tiered_kv.tiers.disk.page_io.os.urandom", counting)
    write(ns, range(5))
    assert [len(salt) for salt in drawn] == [16] * 5
