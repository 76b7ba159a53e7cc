"""The cluster's certificates (EC P-256) and the kubeconfig that carries what a client needs. Nothing here touches a file."""

import base64
import ipaddress
import ssl
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from podwire.model.errors import InvalidInput

CA_LIFE = timedelta(days=3650)
CERTIFICATE_LIFE = timedelta(days=365)
BACKDATED = timedelta(minutes=5)
"""Certificates start a little in the past: clocks differ."""


@dataclass(frozen=True, slots=True)
class KeyPair:
    """A certificate and its private key, PEM."""

    certificate: bytes
    key: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Authority:
    """A certificate authority: `pair` is its own certificate and key."""

    pair: KeyPair

    @classmethod
    def create(cls, name: str, now: datetime) -> "Authority":
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        usage = x509.KeyUsage(
            digital_signature=True, content_commitment=False, key_encipherment=False, data_encipherment=False,
            key_agreement=False, key_cert_sign=True, crl_sign=True, encipher_only=False, decipher_only=False,
        )  # fmt: skip
        certificate = (
            _builder(subject, subject, key.public_key(), now, CA_LIFE)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .sign(key, hashes.SHA256())
        )
        return cls(_pem(certificate, key))

    def issue(self, name: str, hosts: Sequence[str], now: datetime, *, organisations: Sequence[str] = ()) -> KeyPair:
        """A certificate for servers at `hosts` (DNS names and addresses) and for clients called `name`."""
        key = ec.generate_private_key(ec.SECP256R1())
        return _pem(self._certify(key.public_key(), name, hosts, now, organisations), key)

    def sign(self, request: bytes, name: str, hosts: Sequence[str], now: datetime, organisations: Sequence[str]) -> bytes:
        """The certificate (PEM) for the key in `request`, a PEM certificate signing request. What that asks for beyond the
        key is not heeded. Raises InvalidInput where it is none, or not signed with its own key."""
        try:
            parsed = x509.load_pem_x509_csr(request)
            valid = parsed.is_signature_valid
        except (ValueError, TypeError) as error:
            raise InvalidInput(f"this is no certificate signing request: {error}") from error
        key = parsed.public_key()
        if not valid or not isinstance(key, ec.EllipticCurvePublicKey):
            raise InvalidInput("the certificate signing request must hold an EC key and be signed with it")
        return self._certify(key, name, hosts, now, organisations).public_bytes(serialization.Encoding.PEM)

    @property
    def fingerprint(self) -> str:
        """By which a joining node knows this authority: SHA-256 of its certificate, hexadecimal."""
        return fingerprint(self.pair.certificate)

    def _certify(
        self, key: ec.EllipticCurvePublicKey, name: str, hosts: Sequence[str], now: datetime, organisations: Sequence[str]
    ) -> x509.Certificate:
        attributes = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, o) for o in organisations]
        subject = x509.Name([*attributes, x509.NameAttribute(NameOID.COMMON_NAME, name)])
        ca = x509.load_pem_x509_certificate(self.pair.certificate)
        ca_key = serialization.load_pem_private_key(self.pair.key, None)
        assert isinstance(ca_key, ec.EllipticCurvePrivateKey)
        builder = (
            _builder(subject, ca.subject, key, now, min(now + CERTIFICATE_LIFE, ca.not_valid_after_utc) - now)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
            )
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        )
        if hosts:
            builder = builder.add_extension(x509.SubjectAlternativeName([_alternative(host) for host in hosts]), critical=False)
        return builder.sign(ca_key, hashes.SHA256())

    def server_context(self, pair: KeyPair, *, ask_clients: bool = False) -> ssl.SSLContext:
        """A TLS server with `pair`. `ask_clients`: those that have a certificate of this authority may show it."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        load_pair(context, pair)
        if ask_clients:
            context.load_verify_locations(cadata=self.pair.certificate.decode())
            context.verify_mode = ssl.CERT_OPTIONAL
        return context

    def client_context(self, pair: KeyPair | None = None) -> ssl.SSLContext:
        """A TLS client that trusts this authority and nobody else."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(cadata=self.pair.certificate.decode())
        if pair is not None:
            load_pair(context, pair)
        return context


def new_request(name: str) -> tuple[bytes, bytes]:
    """A new private key and the certificate signing request for it, both PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    secret = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return secret, request.public_bytes(serialization.Encoding.PEM)


def fingerprint(certificate: bytes) -> str:
    """SHA-256 of a PEM certificate's DER form, hexadecimal. Raises InvalidInput."""
    try:
        return x509.load_pem_x509_certificate(certificate).fingerprint(hashes.SHA256()).hex()
    except ValueError as error:
        raise InvalidInput(f"this is no PEM certificate: {error}") from error


def expiry(certificate: bytes) -> datetime:
    """When a PEM certificate ends."""
    return x509.load_pem_x509_certificate(certificate).not_valid_after_utc


def load_pair(context: ssl.SSLContext, pair: KeyPair) -> None:
    """The ssl module reads keys from files only: one that nobody else can read and that is gone at once."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(pair.key + pair.certificate)
        file.flush()
        context.load_cert_chain(file.name)


def kubeconfig(name: str, server: str, ca: bytes, token: str, *, namespace: str = "default") -> str:
    """A kubeconfig (YAML text) with one context `name`: the server's URL, its CA and a bearer token embedded. Secret."""
    return _kubeconfig(name, server, ca, {"token": token}, namespace)


def client_kubeconfig(name: str, server: str, ca: bytes, pair: KeyPair) -> str:
    """The same with a client certificate. Secret."""
    fields = {"client-certificate-data": pair.certificate, "client-key-data": pair.key}
    return _kubeconfig(name, server, ca, {key: base64.b64encode(data).decode() for key, data in fields.items()}, "default")


def _kubeconfig(name: str, server: str, ca: bytes, user: dict[str, str], namespace: str) -> str:
    cluster = {"server": server, "certificate-authority-data": base64.b64encode(ca).decode()}
    document = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": name, "cluster": cluster}],
        "users": [{"name": name, "user": user}],
        "contexts": [{"name": name, "context": {"cluster": name, "user": name, "namespace": namespace}}],
        "current-context": name,
    }
    return str(yaml.safe_dump(document, sort_keys=False))


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now: datetime, life: timedelta
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATED)
        .not_valid_after(now + life)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _pem(certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> KeyPair:
    secret = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return KeyPair(certificate.public_bytes(serialization.Encoding.PEM), secret)
