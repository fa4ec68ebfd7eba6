"""TLS to a real Valkey or Redis.

Guarantee: nothing is sent to a server that does not show a certificate of its name, signed by whom
this machine, or the address, trusts.
"""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from harness.server import free_port
from harness.stores import Process, valkey_binary
from support.engines import engine_or_skip
from tiered_kv.tiers.shared.address import parse_address

pytestmark = pytest.mark.timeout(120)


def write_certificate(folder: Path, name: x509.GeneralName) -> Path:
    """A certificate for `name` that signs itself, and its key beside it."""
    folder.mkdir()
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "store")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([name]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    no_password = serialization.NoEncryption()
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    (folder / "key.pem").write_bytes(key.private_bytes(encoding, form, no_password))
    path = folder / "certificate.pem"
    path.write_bytes(certificate.public_bytes(encoding))
    return path


class Store:
    """A server that speaks TLS only; authority: what its certificate is to be checked by."""

    def __init__(self, folder: Path, name: x509.GeneralName) -> None:
        self.authority = write_certificate(folder, name)
        self.port = free_port()
        binary = engine_or_skip(valkey_binary)
        command = [binary, "--port", "0", "--tls-port", str(self.port), "--bind", "127.0.0.1"]
        command += ["--tls-cert-file", str(self.authority), "--tls-auth-clients", "no"]
        command += ["--tls-key-file", str(folder / "key.pem"), "--save", "", "--dir", str(folder)]
        self.process = Process(command, folder / "log", self.port)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    found = Store(tmp_path / "right", x509.IPAddress(ipaddress.ip_address("127.0.0.1")))
    with found.process:
        yield found


@pytest.fixture
def another(tmp_path: Path) -> Iterator[Store]:
    found = Store(tmp_path / "another", x509.DNSName("store.example.org"))
    with found.process:
        yield found


def written(store: Store, scheme: str = "valkeys", more: str = "") -> list[bool]:
    from tiered_kv.tiers.shared.valkey import ValkeyBlobs

    address = parse_address("--tiered-kv-store", f"{scheme}://127.0.0.1:{store.port}{more}")
    blobs = ValkeyBlobs(address, 5.0)
    piece = blobs.memory(4)
    return list(blobs.write(["key"], [(piece,)], [False]))


def test_who_is_known_is_written_to(store: Store) -> None:
    assert written(store, more=f"?ca={store.authority}") == [True]


def test_who_is_not_known_is_not(store: Store) -> None:
    import valkey

    with pytest.raises(valkey.ConnectionError, match="self-signed"):
        written(store)


def test_a_certificate_of_another_name_will_not_do(another: Store) -> None:
    """The authority is trusted, as a public one is, by which anybody has a certificate."""
    import valkey

    with pytest.raises(valkey.ConnectionError, match="not valid for"):
        written(another, more=f"?ca={another.authority}")


def test_no_tls_where_it_is_wanted_is_an_error(store: Store) -> None:
    import valkey

    with pytest.raises(valkey.ConnectionError):
        written(store, scheme="valkey")
