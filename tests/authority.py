"""A certificate authority of a test's own, and the files of nodes that Ray and loray read."""

from __future__ import annotations

import datetime
import ipaddress
from itertools import count
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

_BEGIN, _END = datetime.datetime(2020, 1, 1), datetime.datetime(2200, 1, 1)


class Authority:
    """Its files are in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._numbers = count(1)
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "authority")])
        builder = self._builder(self._key.public_key(), self._name)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        self._write("ca.crt", builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))

    def node(self, *addresses: str) -> dict[str, str]:
        """The environment of a node at these addresses, with a certificate of its own."""
        key, number = ec.generate_private_key(ec.SECP256R1()), next(self._numbers)
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"node {number}")])
        names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(a)) for a in addresses])
        certificate = self._builder(key.public_key(), name).add_extension(names, critical=False)
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        signed = certificate.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
        return {
            "RAY_USE_TLS": "1",
            "RAY_TLS_SERVER_CERT": self._write(f"{number}.crt", signed),
            "RAY_TLS_SERVER_KEY": self._write(f"{number}.key", private),
            "RAY_TLS_CA_CERT": str(self._folder / "ca.crt"),
        }

    def _builder(self, key: ec.EllipticCurvePublicKey, name: x509.Name) -> x509.CertificateBuilder:
        builder = x509.CertificateBuilder().issuer_name(self._name).subject_name(name).public_key(key)
        return builder.serial_number(x509.random_serial_number()).not_valid_before(_BEGIN).not_valid_after(_END)

    def _write(self, name: str, data: bytes) -> str:
        path = self._folder / name
        path.write_bytes(data)
        return str(path)
