"""Who may ask: names, pages, tokens; and what the answers tell a browser."""

from __future__ import annotations

import stat

import pytest

from raphael.base.stage import StageError
from raphael.serve.door.access import HEADERS, TOKEN, read_token
from raphael.serve.server import Address

SECRET = "a-token-of-the-tests-0123"


def test_the_own_page_passes_and_every_other_page_is_refused(gated):
    served = gated()
    own = f"http://127.0.0.1:{served.port}"
    asked = {"prompt": "", "model": "none such"}  # reaches the application, which refuses it by 404

    def status(**headers: str) -> int:
        return served.client.post("/v1/images", json=asked, headers=headers).status_code

    assert status() == status(Origin=own) == status(Origin=f"http://localhost:{served.port}") == 404
    for origin in ("http://evil.example", "null", "", "http://127.0.0.1:1", f"{own}.evil.example"):
        assert status(Origin=origin) == 403, origin
    assert status(**{"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "cors"}) == 403
    assert served.client.get("/v1/models", headers={"Origin": "http://evil.example"}).status_code == 403


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1", "127.0.0.1:1", "127.0.0.1.evil.example:{port}", ""])
def test_a_name_that_is_not_the_servers_is_misdirected(gated, host):
    served = gated()
    answer = served.client.get("/healthz", headers={"Host": host.format(port=served.port)})
    assert answer.status_code in (400, 421), answer.text  # 400: no name at all, refused by h11 before us
    assert "evil" not in answer.text


def test_no_answer_has_a_cors_header_or_a_cookie_and_each_says_what_a_page_may_do(gated, gate):
    served = gated()
    for _ in range(3):
        gate.step.release()
    answers = [
        served.client.get("/healthz"),
        served.client.post("/v1/images", json={"prompt": "x"}),
        served.client.post("/v1/images", json={"prompt": 1}),
        served.client.get("/nothing"),
        served.client.options("/v1/images", headers={"Origin": "http://evil.example"}),
        served.client.options("/v1/images", headers={"Access-Control-Request-Method": "POST"}),
        served.client.get("/healthz", headers={"Host": "evil.example"}),
    ]
    assert [answer.status_code for answer in answers] == [200, 200, 422, 404, 403, 405, 421]
    for answer in answers:
        assert not [name for name in answer.headers if name.startswith("access-control") or name == "set-cookie"]
        assert {name: answer.headers[name] for name in HEADERS} == HEADERS
        assert "server" not in answer.headers
    for part in ("script-src 'self'", "frame-ancestors 'none'", "default-src 'self'", "form-action 'none'"):
        assert part in HEADERS["content-security-policy"]
    assert "unsafe" not in HEADERS["content-security-policy"]


def test_with_a_token_only_who_knows_it_is_served_and_the_page_is_free(gated):
    served = gated(token=SECRET)

    def status(path: str, *values: str) -> int:
        return served.client.get(path, headers=[("Authorization", value) for value in values]).status_code

    assert status("/healthz") == status("/openapi.json") == 200 and status("/") != 401
    for path in ("/v1/models", "/v1/jobs/x", "/v1/jobs/x/events", "/metrics"):
        assert status(path) == 401
        assert status(path, f"Bearer {SECRET}") in (200, 404)
    wrong = [f"Basic {SECRET}", f"Bearer {SECRET}x", f"Bearer {SECRET[:-1]}", "Bearer", SECRET]
    assert {status("/v1/models", value) for value in wrong} == {401}
    assert status("/v1/models", f"Bearer {SECRET}", "Bearer x") == 401
    refused = served.client.get("/v1/models")
    assert refused.headers["www-authenticate"].startswith("Bearer") and refused.json()["status"] == 401


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "a.example"])
def test_a_door_that_others_reach_stays_shut_without_a_token(host):
    with pytest.raises(StageError, match="expected --token FILE"):
        Address(host)
    assert Address(host, token=SECRET).host == host


def test_the_names_are_loopbacks_those_given_and_the_address_itself():
    own = ("127.0.0.1:8000", "localhost:8000", "[::1]:8000")
    assert Address().hosts(8000) == own
    assert Address("0.0.0.0", token=SECRET).hosts(8000) == own
    assert Address("192.0.2.1", token=SECRET).hosts(8000) == (*own, "192.0.2.1:8000")
    named = Address(names=("a.example", "b.example:443")).hosts(8000)
    assert set(named) == {*own, "a.example:8000", "a.example", "b.example:443"}
    assert "127.0.0.1" in Address().hosts(80)


def test_a_port_that_is_taken_is_one_line():
    with Address(port=0).bind() as taken:
        taken.listen()
        with pytest.raises(StageError, match=r"127.0.0.1:\d+: Address already in use; expected a free port"):
            Address(port=taken.getsockname()[1]).bind()
    with pytest.raises(StageError, match="expected a free port"):
        Address(port=70_000).bind()


def test_a_token_is_made_for_its_owner_alone_and_read_again(tmp_path, monkeypatch):
    file = tmp_path / "run" / "token"
    token = read_token(file)
    assert len(token) >= 43 and read_token(file) == token and stat.S_IMODE(file.stat().st_mode) == 0o600
    file.chmod(0o644)
    with pytest.raises(StageError, match="can be read by others"):
        read_token(file)
    file.chmod(0o600)
    file.write_text("short\n")
    with pytest.raises(StageError, match="can be guessed"):
        read_token(file)
    monkeypatch.delenv(TOKEN, raising=False)
    assert read_token(None) is None
    monkeypatch.setenv(TOKEN, SECRET)
    assert read_token(None) == SECRET
    monkeypatch.setenv(TOKEN, "short")
    with pytest.raises(StageError, match=TOKEN):
        read_token(None)
