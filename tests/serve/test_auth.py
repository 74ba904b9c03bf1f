"""Who may call what: hostile headers, 401 and 403, revocation while an answer is open, addresses to listen on."""

import random
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
from fastapi import Depends, FastAPI
from fastapi.responses import JSONResponse
from fastapi.testclient import TestClient

from conftest import wait_until
from herd.errors import ConfigError
from herd.serve.auth import Authenticator, Principal, check_binding, public, require, scope_of
from herd.serve.errors import ApiError, Forbidden, StoreError, Unauthorized
from herd.serve.keys import KeyPolicy, change_key, create_key, revoke_key, rotate_key
from herd.serve.store import now_ms


@pytest.fixture
def authenticator(store):
    authenticator = Authenticator(store, poll_seconds=0.02)
    yield authenticator
    authenticator.close()


@pytest.fixture
def client(authenticator):
    app = FastAPI()
    app.state.authenticator = authenticator

    @app.exception_handler(ApiError)
    def show(request, error):
        return JSONResponse({"error": error.message}, error.status)

    @app.get("/chat")
    def chat(principal: Principal = Depends(require("chat"))):  # noqa: B008
        return principal.name

    @app.get("/admin", dependencies=[Depends(require("admin"))])
    def admin():
        return "admin"

    @app.get("/health", dependencies=[Depends(public)])
    def health():
        return "fine"

    @app.get("/forgotten")
    def forgotten():
        return "?"

    return TestClient(app)


def headers_of(token: str) -> list[dict[str, str]]:
    return [{"Authorization": f"Bearer {token}"}, {"authorization": f"bearer  {token}"}, {"X-API-Key": token}]


def test_both_headers_are_checked_alike(store, client):
    _, user = create_key(store, "alice", KeyPolicy(), actor="test")
    _, narrow = create_key(store, "narrow", KeyPolicy(scopes={"models"}), actor="test")
    for headers in headers_of(user):
        assert client.get("/chat", headers=headers).json() == "alice"
        assert client.get("/admin", headers=headers).status_code == 403
    for headers in headers_of(narrow):
        assert client.get("/chat", headers=headers).status_code == 403
    for path in ("/chat", "/admin"):
        assert client.get(path).status_code == 401
        assert (
            client.get(path, params={"key": user, "api_key": user}, cookies={"key": user}).status_code == 401
        )
    assert client.get("/health").status_code == 200


def test_two_headers_must_be_the_same_key(store, client):
    _, one = create_key(store, "one", KeyPolicy(), actor="test")
    _, two = create_key(store, "two", KeyPolicy(), actor="test")
    assert (
        client.get("/chat", headers={"Authorization": f"Bearer {one}", "x-api-key": one}).status_code == 200
    )
    for other in (two, "wrong", ""):
        for first, second in ((one, other), (other, one)):
            both = {"Authorization": f"Bearer {first}", "x-api-key": second}
            assert client.get("/chat", headers=both).status_code == 401
    proxy = {"Authorization": "Basic dXNlcjpwYXNz", "x-api-key": one}
    assert client.get("/chat", headers=proxy).status_code == 200


def hostile_tokens() -> list[str]:
    """Return 200 texts that are no keys: SQL, NUL, other letters, great lengths, changed keys."""
    good = f"herd-{'a' * 12}-{'B' * 43}"
    texts = [
        "' OR '1'='1",
        "' OR 1=1 --",
        '" OR ""="',
        "'; DROP TABLE keys; --",
        "' UNION SELECT * FROM keys --",
        "%",
        "_" * 60,
        "herd-%-%",
        "herd-____________-" + "_" * 43,
        "null",
        "None",
        "undefined",
        "true",
        "[]",
        "{}",
        "\x00",
        good + "\x00",
        "\x00" + good,
        good[:20] + "\x00" + good[21:],
        "ａ" * 60,
        "herd-аааааааааааа-" + "B" * 43,
        "\u202e" + good,
        "😀" * 20,
        "A" * 1_000_000,
        good * 20_000,
        "herd-" * 1000,
        "-" * 60,
        good.replace("-", "–"),
        good + " ",
        good + "," + good,
        "../../etc/passwd",
        "${jndi:ldap://x}",
        "{{7*7}}",
        "%00",
        "%27%20OR%201",
        "\t",
        good.upper(),
        good.title(),
    ]
    draw = random.Random(0)
    while len(texts) < 200:
        letters = list(good)
        for _ in range(draw.randint(1, 4)):
            letters[draw.randrange(len(letters))] = draw.choice("'\"\\;%\x00\x01\x7f\x80\xffé√ -_*=()")
        texts.append("".join(letters))
    return texts


@pytest.mark.parametrize("header", ["Authorization", "x-api-key"])
def test_two_hundred_hostile_tokens_are_401_and_change_nothing(store, client, header):
    create_key(store, "alice", KeyPolicy(), actor="test")
    with store.read() as connection:
        before = list(connection.connection.driver_connection.iterdump())
    for text in hostile_tokens():
        value = f"Bearer {text}" if header == "Authorization" else text
        answer = client.get("/chat", headers={header: value.encode("utf-8")})
        assert answer.status_code == 401, text[:60]
        assert text[:60] not in answer.text or len(text) < 3
    with store.read() as connection:
        assert list(connection.connection.driver_connection.iterdump()) == before


def test_revoked_rotated_and_expired_keys_are_401(store, authenticator):
    info, old = create_key(store, "alice", KeyPolicy(), actor="test")
    _, new = rotate_key(store, info.id, "test")
    with pytest.raises(Unauthorized, match="wrong"):
        authenticator.authenticate([f"Bearer {old}"], [])
    assert authenticator.authenticate([], [new]).key_id == info.id
    revoke_key(store, info.id, "test")
    with pytest.raises(Unauthorized, match="revoked"):
        authenticator.authenticate([], [new])
    _, short = create_key(store, "short", KeyPolicy(), actor="test", expires_ms=now_ms() + 50)
    principal = authenticator.authenticate([], [short])
    time.sleep(0.06)
    assert authenticator.has_ended(principal)
    with pytest.raises(Unauthorized, match="expired"):
        authenticator.authenticate([], [short])


@pytest.mark.parametrize("end", [revoke_key, rotate_key])
def test_open_answers_learn_that_their_key_has_ended(store, authenticator, end):
    create_key(store, "bob", KeyPolicy(), actor="test")
    _, token = create_key(store, "alice", KeyPolicy(), actor="test")
    principal = authenticator.authenticate([], [token])
    assert not authenticator.has_ended(principal)
    end(store, "bob", "test")
    wait_until(lambda: authenticator._version > principal.keys_version)
    assert not authenticator.has_ended(principal)
    end(store, "alice", "test")
    wait_until(lambda: authenticator.has_ended(principal))


def test_a_key_made_a_moment_ago_has_not_ended(store, authenticator):
    for number in range(30):
        _, token = create_key(store, f"key{number}", KeyPolicy(), actor="test")
        assert not authenticator.has_ended(authenticator.authenticate([], [token]))


def test_keys_are_refused_while_the_store_is_away(store, authenticator, monkeypatch):
    _, token = create_key(store, "alice", KeyPolicy(), actor="test")
    store.path.rename(store.path.with_suffix(".moved"))
    store.path.mkdir()
    store.close()
    with pytest.raises(StoreError) as caught:
        authenticator.authenticate([], [token])
    assert (caught.value.status, caught.value.should_retry) == (503, True)


def test_a_key_uses_only_its_models():
    principal = replace(Principal.local(), models=frozenset({"small"}))
    principal.check_model("small")
    with pytest.raises(Forbidden, match=r"big.*small"):
        principal.check_model("big")
    Principal.local().check_model("anything")


def test_without_a_store_everybody_is_local():
    authenticator = Authenticator(None)
    principal = authenticator.authenticate([], [])
    assert principal == Principal.local()
    assert principal.is_admin
    assert not authenticator.has_ended(principal)
    authenticator.close()


def test_each_route_states_its_scope(client):
    scopes = {route.path: scope_of(route) for route in client.app.routes if hasattr(route, "dependant")}
    assert scopes == {"/chat": "chat", "/admin": "admin", "/health": "public", "/forgotten": None}


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "localhost", "::1", "[::1]"])
def test_a_server_without_keys_may_listen_to_its_own_machine(host):
    check_binding(host, with_keys=False)


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "", "192.168.1.5", "example.org", "localhost.example.org", "127.1"]
)
def test_a_server_without_keys_may_not_listen_to_others(host):
    with pytest.raises(ConfigError, match="add --keys"):
        check_binding(host, with_keys=False)
    check_binding(host, with_keys=True)


def test_a_new_end_of_a_key_holds_for_open_answers_too(store, authenticator):
    principal = authenticator.authenticate([], [create_key(store, "a", KeyPolicy(), actor="test")[1]])
    change_key(store, "a", {}, "test", expires_ms=now_ms() + 1500)
    wait_until(lambda: authenticator.has_ended(principal))
    change_key(store, "a", {}, "test", expires_ms=None)
    wait_until(lambda: not authenticator.has_ended(principal))


def test_whoever_watches_a_key_is_told_once_it_has_ended(store, authenticator):
    ended: list[str] = []
    for name, expires in (("revoked", None), ("expired", now_ms() + 1000), ("kept", None), ("left", None)):
        _, token = create_key(store, name, KeyPolicy(), actor="test", expires_ms=expires)
        principal = authenticator.authenticate([], [token])
        stop = authenticator.watch(principal, lambda name=name: ended.append(name))
        if name == "left":
            stop()
            stop()
    revoke_key(store, "revoked", "test")
    revoke_key(store, "left", "test")
    wait_until(lambda: set(ended) == {"revoked", "expired"})


def test_the_page_on_security_names_tests_that_exist():
    root = Path(__file__).parents[2]
    names = set(
        re.findall(r"`(serve/test_\w+\.py)`", (root / "docs" / "security.md").read_text(encoding="utf-8"))
    )
    assert len(names) > 5
    assert [name for name in names if not (root / "tests" / name).exists()] == []
