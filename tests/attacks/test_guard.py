"""The door alone, without a server behind it: every header as a browser or a stranger may send it."""

from __future__ import annotations

import asyncio
import base64

import pytest

from flows.serve.guard import Guard, mlflow_app, prefect_app
from raphael.base.stage import StageError

OWN = ("host", "127.0.0.1:4200")
BASIC = ("authorization", "Basic " + base64.b64encode(b"raphael:right").decode())


def status_of(*headers: tuple[str, str], path: str = "/api/x", method: str = "POST", auth: str | None = None) -> int:
    """What the door answers; 200 where the application behind it was reached."""
    sent = []

    async def application(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message):
        sent.append(message)

    encoded = [(name.encode(), value.encode("latin-1")) for name, value in headers]
    scope = {"type": "http", "path": path, "method": method, "headers": encoded}
    asyncio.run(Guard(application, ["127.0.0.1:4200", "localhost:4200"], auth)(scope, None, send))
    return sent[0]["status"]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ([OWN], 200),
        ([("host", "LocalHost:4200")], 200),
        ([], 421),
        ([("host", "")], 421),
        ([("host", "127.0.0.1")], 421),
        ([("host", "127.0.0.1:4201")], 421),
        ([("host", "127.0.0.1:4200.evil.example")], 421),
        ([("host", "evil.example:4200")], 421),
        ([OWN, OWN], 421),
        ([OWN, ("host", "evil.example")], 421),
        ([OWN, ("x-forwarded-host", "evil.example")], 200),
        ([OWN, ("origin", "http://localhost:4200")], 200),
        ([OWN, ("origin", "https://localhost:4200")], 403),
        ([OWN, ("origin", "http://localhost:4201")], 403),
        ([OWN, ("origin", "null")], 403),
        ([OWN, ("origin", "")], 403),
        ([OWN, ("origin", "http://127.0.0.1:4200"), ("origin", "https://evil.example")], 403),
    ],
)
def test_only_own_names_and_own_pages_pass(headers: list[tuple[str, str]], status: int) -> None:
    assert status_of(*headers) == status


@pytest.mark.parametrize(
    ("site", "mode", "dest", "method", "status"),
    [
        ("same-origin", "cors", "empty", "POST", 200),
        ("none", "navigate", "document", "GET", 200),
        ("cross-site", "navigate", "document", "GET", 200),  # a link
        ("cross-site", "navigate", "document", "POST", 403),  # a form
        ("cross-site", "navigate", "iframe", "GET", 403),
        ("cross-site", "no-cors", "image", "GET", 403),
        ("same-site", "no-cors", "script", "GET", 403),  # another port of this machine
        ("cross-site", "websocket", "empty", "GET", 403),
    ],
)
def test_another_site_may_link_to_a_page_and_nothing_else(
    site: str, mode: str, dest: str, method: str, status: int
) -> None:
    said = [("sec-fetch-site", site), ("sec-fetch-mode", mode), ("sec-fetch-dest", dest)]
    assert status_of(OWN, *said, method=method) == status


@pytest.mark.parametrize(
    ("value", "status"),
    [
        (BASIC[1], 200),
        (BASIC[1].replace("Basic", "basic"), 200),
        (BASIC[1].replace("Basic", "Bearer"), 401),
        ("Basic " + base64.b64encode(b"raphael:wrong").decode(), 401),
        ("Basic " + base64.b64encode(b"raphael:right2").decode(), 401),
        ("Basic " + base64.b64encode(b"raphael:").decode(), 401),
        ("Basic \xff\xfe", 401),
        ("Basic", 401),
        ("", 401),
    ],
)
def test_only_the_right_password_passes(value: str, status: int) -> None:
    assert status_of(OWN, ("authorization", value), auth="raphael:right") == status


def test_health_alone_is_told_without_a_password() -> None:
    assert status_of(OWN, path="/health", auth="raphael:right") == 200
    for path in ("/health/", "/version", "/", "/x/health", "//health"):
        assert status_of(OWN, path=path, auth="raphael:right") == 401


def test_a_server_without_names_or_without_a_password_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StageError, match="RAPHAEL_GUARD_HOSTS"):
        Guard(None, ["", " "])
    monkeypatch.delenv("RAPHAEL_GUARD_AUTH", raising=False)
    monkeypatch.delenv("PREFECT_SERVER_API_AUTH_STRING", raising=False)
    with pytest.raises(StageError, match="RAPHAEL_GUARD_AUTH"):
        mlflow_app()
    with pytest.raises(StageError, match="PREFECT_SERVER_API_AUTH_STRING"):
        prefect_app()
