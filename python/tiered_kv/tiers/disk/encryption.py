"""Encryption at rest: the key file, the key check of a directory, and the sealing of pages.

Every record is encrypted under a key of its own, HMAC-SHA256(directory key, record salt), where the
salt is 128 random bits drawn for that record alone; the nonce is therefore constant. A nonce could
be used twice under one key only if two salts of 128 bits collided (about 1 in 10^15 after 10^12
records), and neither a crash, nor a restored backup, nor a fork of the process can make it happen:
there is no counter to fall back. The record's header is authenticated with the payload, so a record
cannot be passed off as another page's. The directory key is derived from the user's key and a salt
of the directory's (HKDF-SHA256, RFC 5869).

Not hidden: sizes, times, the description of a namespace (the model's name), and the names of pages,
which are hashes of token ids: whoever has the files can check whether a prompt that he guesses is
there.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import stat
from pathlib import Path
from typing import TypeAlias

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from tiered_kv.core.errors import DiskTierError
from tiered_kv.tiers.disk.encryption_header import AES, CHACHA20, EncryptionHeader
from tiered_kv.tiers.disk.record import (
    ENCODING_AES_256_GCM,
    ENCODING_CHACHA20_POLY1305,
    SALT_BYTES,
)

KEY_BYTES = 32
AEAD_TAG_BYTES = 16
_KEY_FILE_BYTES_MAX = 1024
_NONCE = bytes(12)
_Aead: TypeAlias = type[AESGCM] | type[ChaCha20Poly1305]
_CIPHERS: dict[str, tuple[int, _Aead]] = {
    AES: (ENCODING_AES_256_GCM, AESGCM),
    CHACHA20: (ENCODING_CHACHA20_POLY1305, ChaCha20Poly1305),
}


def read_key_file(path: Path) -> bytes:
    """The 32 bytes of a key, from a file of 32 raw bytes or 64 hexadecimal digits.

    Raises DiskTierError: missing, readable by others than its owner, or no key.
    """
    how = "write one with `(umask 077; openssl rand -hex 32 > FILE)`"
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            raise DiskTierError(f"The key file {path} is not a file: {how}.")
        if mode & 0o077:
            raise DiskTierError(
                f"The key file {path} may be used by others than its owner (mode "
                f"{stat.S_IMODE(mode):04o}): `chmod 600` it."
            )
        with path.open("rb") as file:
            contents = file.read(_KEY_FILE_BYTES_MAX)
    except OSError as error:
        raise DiskTierError(f"The key file {path} cannot be read ({error}): {how}.") from error
    if len(contents) == KEY_BYTES:
        return contents
    try:
        key = bytes.fromhex(contents.decode("ascii").strip())
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise DiskTierError(
            f"The key file {path} holds no key of {KEY_BYTES} bytes or {2 * KEY_BYTES} hexadecimal "
            f"digits: {how}."
        )
    return key


def new_header(key: bytes) -> EncryptionHeader:
    """For a new directory: AES where the CPU has instructions for it, else ChaCha20."""
    cipher = AES if _has_aes_instructions() else CHACHA20
    salt = secrets.token_bytes(SALT_BYTES)
    return EncryptionHeader(cipher, salt, _derive(key, salt, b"key check"))


def cipher_of(header: EncryptionHeader, key: bytes) -> PageCipher | None:
    """None if this is not the directory's key."""
    if not hmac.compare_digest(header.key_check, _derive(key, header.salt, b"key check")):
        return None
    return PageCipher(header.cipher, _derive(key, header.salt, b"pages"))


def new_cipher(key: bytes) -> PageCipher:
    """Under a key of 32 bytes that is used for nothing else.

    Always AES: servers of several kinds are to read what one of them wrote.
    """
    return PageCipher(AES, key)


def _derive(key: bytes, salt: bytes, purpose: bytes) -> bytes:
    info = b"tiered-kv disk tier: " + purpose
    return HKDF(algorithm=hashes.SHA256(), length=KEY_BYTES, salt=salt, info=info).derive(key)


def _has_aes_instructions() -> bool:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return True
    # x86 says "flags", ARM "Features".
    lines = [line for line in text.splitlines() if line.lower().startswith(("flags", "features"))]
    return not lines or "aes" in lines[0].split()


class PageCipher:
    """Encrypts and decrypts payloads. Thread-safe: it holds keys and no other state."""

    def __init__(self, name: str, directory_key: bytes) -> None:
        self.encoding, self._aead = _CIPHERS[name]
        self.name = name
        self._directory_key = directory_key

    def encrypt(self, fields: bytes, salt: bytes, payload: memoryview, target: memoryview) -> bytes:
        """Fill `target`, 16 bytes longer than `payload`, with ciphertext; returns the tag.

        fields: what is authenticated beside it.
        salt: SALT_BYTES from the kernel (`os.urandom`), used for this call only.
        """
        self._of_record(salt).encrypt_into(_NONCE, payload, fields, target)
        return bytes(target[len(payload) :])

    def decrypt(self, fields: bytes, salt: bytes, sealed: memoryview, payload: memoryview) -> bool:
        """Fill `payload` from `sealed` (ciphertext and tag); False if anything was tampered with.

        After False `payload` may hold anything.
        """
        try:
            self._of_record(salt).decrypt_into(_NONCE, sealed, fields, payload)
        except InvalidTag:
            return False
        return True

    def _of_record(self, salt: bytes) -> AESGCM | ChaCha20Poly1305:
        return self._aead(hmac.digest(self._directory_key, salt, hashlib.sha256))
