"""https means that the server is who it says: a certificate of another name, of nobody or of yesterday is refused."""

from __future__ import annotations

import contextlib
import datetime
import io
import socket
import ssl
import threading
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from PIL import Image

from data_pipeline.gateway import proxy
from data_pipeline.gateway.addresses import Resolver
from data_pipeline.gateway.proxy import Fetched, Policy, Refused, fetch

HOST = "pictures.example"
DAY = datetime.timedelta(days=1)


def certificate(folder: Path, name: str, days: tuple[int, int] = (-1, 1)) -> Path:
    """Key and certificate in one file, signed by itself. days: valid from and until, from today."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + days[0] * DAY)
        .not_valid_after(now + days[1] * DAY)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    file = folder / f"{name}{days[1]}.pem"
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    file.write_bytes(made.public_bytes(pem) + key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    return file


@contextlib.contextmanager
def server(file: Path, body: bytes):
    """A web server with that certificate. Yields its port."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file)
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    plain, _ = listening.accept()
                    with contextlib.suppress(OSError), context.wrap_socket(plain, server_side=True) as connection:
                        connection.recv(65536)
                        head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n"
                        connection.sendall(head.encode() + body)

        threading.Thread(target=serve, daemon=True).start()
        yield listening.getsockname()[1]


@pytest.mark.parametrize(
    ("name", "days", "is_trusted", "passes"),
    [
        (HOST, (-1, 1), True, True),
        (HOST, (-1, 1), False, False),  # signed by nobody that this machine knows
        ("other.example", (-1, 1), True, False),
        (HOST, (-3, -1), True, False),  # over
        (HOST, (1, 3), True, False),  # not yet
    ],
)
def test_only_a_valid_certificate_of_this_name_lets_an_image_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, days: tuple[int, int], is_trusted: bool, passes: bool
) -> None:
    stream = io.BytesIO()
    Image.new("RGB", (30, 20), "teal").save(stream, "png")
    body, file = stream.getvalue(), certificate(tmp_path, name, days)
    monkeypatch.setattr(proxy, "_tls_context", [])
    if is_trusted:
        proxy._tls().load_verify_locations(file)
    with server(file, body) as port:
        connect = proxy._Attempt._connect
        monkeypatch.setattr(proxy._Attempt, "_connect", lambda self, address, _: connect(self, "127.0.0.1", port))
        policy = Policy(resolver=Resolver(lambda host, port: ["93.184.215.14"]), retries=0)
        outcome = fetch(f"https://{HOST}/a.png", policy)
    assert (isinstance(outcome, Fetched) and outcome.body == body) if passes else outcome == Refused("tls")
