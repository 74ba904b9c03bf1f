"""Routes for operators: who may see and change which keys, and whose usage."""

import pytest
from fastapi.testclient import TestClient

from conftest import CONTEXT, ScriptedLoop
from herd.serve.app import create_app
from herd.serve.chat import ServedModel
from herd.serve.keys import KeyPolicy, create_key, first_admin_key, list_keys
from herd.serve.ledger import Ledger
from herd.serve.settings import ServeSettings
from herd.serve.store import audit_log, now_ms


@pytest.fixture
def client(store, tokenizer):
    served = ServedModel("m", ScriptedLoop(), tokenizer, CONTEXT)
    with TestClient(create_app(served, store, ServeSettings()), base_url="http://127.0.0.1") as client:
        yield client


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


@pytest.fixture
def root(store):
    return bearer(first_admin_key(store, "test"))


def test_an_administrator_creates_lists_rotates_and_revokes(store, client, root):
    body = {
        "name": "alice",
        "policy": {"concurrent": 2, "budgets": [{"unit": "tokens", "period": "day", "amount": 9}]},
    }
    made = client.post("/herd/v1/keys", json=body, headers=root)
    assert made.status_code == 201
    assert made.headers["cache-control"] == "no-store"
    id_, token = made.json()["id"], made.json()["key"]
    assert client.get("/herd/v1/usage", headers=bearer(token)).status_code == 200
    assert [key["name"] for key in client.get("/herd/v1/keys", headers=root).json()] == ["admin", "alice"]
    shown = client.get(f"/herd/v1/keys/{id_}", headers=root)
    assert shown.json()["policy"]["concurrent"] == 2
    assert not {"digest", "key"} & shown.json().keys()
    rotated = client.post(f"/herd/v1/keys/{id_}/rotate", headers=root).json()["key"]
    assert client.get("/herd/v1/usage", headers=bearer(token)).status_code == 401
    assert client.get("/herd/v1/usage", headers=bearer(rotated)).status_code == 200
    assert client.delete(f"/herd/v1/keys/{id_}", headers=root).json()["state"] == "revoked"
    assert client.get("/herd/v1/usage", headers=bearer(rotated)).status_code == 401
    assert client.post(f"/herd/v1/keys/{id_}/rotate", headers=root).status_code == 400
    actor = f"key:{list_keys(store)[0].id}"
    assert [(row["actor"], row["act"]) for row in audit_log(store)][1:] == [
        (actor, "create key"),
        (actor, "rotate key"),
        (actor, "revoke key"),
    ]


@pytest.mark.parametrize(
    "body, named",
    [
        (b"", "JSON"),
        (b"[]", "object"),
        (b"{}", "name"),
        (b'{"name": "=cmd"}', "=cmd"),
        (b'{"name": "a", "policy": {"scopes": ["root"]}}', "policy.scopes"),
        (b'{"name": "a", "policy": {"concurrent": 0}}', "policy.concurrent"),
        (
            b'{"name": "a", "policy": {"budgets": [{"unit": "tokens", "period": "day", "amount": -1}]}}',
            "amount",
        ),
        (b'{"name": "a", "digest": "0"}', "digest"),
        (b'{"name": "a", "expires_ms": 1}', "expired"),
    ],
)
def test_a_malformed_key_is_a_400_that_names_the_field(store, client, root, body, named):
    answer = client.post("/herd/v1/keys", content=body, headers=root)
    assert answer.status_code == 400
    assert named in answer.json()["error"]["message"]
    assert len(list_keys(store)) == 1


def test_users_may_not_manage_keys(store, client, root):
    info, token = create_key(store, "alice", KeyPolicy(), actor="test")
    before = list_keys(store)
    for method, path in (
        ("GET", "/herd/v1/keys"), ("POST", "/herd/v1/keys"), ("GET", f"/herd/v1/keys/{info.id}"),
        ("DELETE", f"/herd/v1/keys/{info.id}"), ("POST", f"/herd/v1/keys/{info.id}/rotate"),
        ("GET", "/metrics"), ("GET", "/herd/v1/stats"),
    ):  # fmt: skip
        assert client.request(method, path, headers=bearer(token)).status_code == 403, path
    assert list_keys(store) == before


def test_a_key_sees_its_own_usage_only(store, client, root):
    ledger = Ledger(store)
    made = {name: create_key(store, name, KeyPolicy(), actor="test") for name in ("alice", "bob")}
    for _, token in made.values():
        principal = client.app.state.authenticator.authenticate([], [token])
        reservation = ledger.reserve(
            principal, model="m", endpoint="e", prompt_tokens=3, max_completion_tokens=4, request_id="same"
        )
        reservation.advance(2)
        reservation.settle(2)
    ledger.close()
    (alice, _), (bob, bob_token) = made["alice"], made["bob"]
    own = client.get("/herd/v1/usage", headers=bearer(bob_token)).json()
    assert [row["key_name"] for row in own["days"]] == ["bob"]
    assert client.get("/herd/v1/usage", params={"key": bob.id}, headers=bearer(bob_token)).json() == own
    unknown = client.get("/herd/v1/usage", params={"key": "zzzzzzzzzzzz"}, headers=bearer(bob_token))
    other = client.get("/herd/v1/usage", params={"key": alice.id}, headers=bearer(bob_token))
    assert (other.status_code, other.json()) == (404, unknown.json())
    everything = client.get("/herd/v1/usage", headers=root).json()
    assert {row["key_name"] for row in everything["days"]} == {"alice", "bob"}
    table = client.get("/herd/v1/usage", params={"key": alice.id, "format": "csv"}, headers=root)
    assert table.headers["content-type"] == "text/csv; charset=utf-8"
    assert table.text.splitlines()[1].split(",")[4:8] == ["1", "3", "0", "2"]


@pytest.mark.parametrize("day", ["yesterday", "2026-13-01", "2026-1-1", "' OR 1=1 --", "\x00"])
def test_a_malformed_day_is_a_400(client, root, day):
    assert client.get("/herd/v1/usage", params={"since": day}, headers=root).status_code == 400
    assert client.get("/herd/v1/usage", params={"until": day}, headers=root).status_code == 400


@pytest.mark.parametrize("key_id", ["admin", "' OR 1=1 --", "zzzzzzzzzzzz", "%00", "..%2f..", "a" * 5000])
def test_unknown_ids_are_404_and_names_are_no_ids(store, client, root, key_id):
    before = list_keys(store)
    for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/rotate")):
        assert client.request(method, f"/herd/v1/keys/{key_id}{path}", headers=root).status_code == 404
    assert list_keys(store) == before


def test_an_administrator_changes_a_key(store, client, root):
    info, token = create_key(store, "alice", KeyPolicy(concurrent=2), actor="test")
    path = f"/herd/v1/keys/{info.id}"
    budget = {"unit": "tokens", "period": "day", "amount": 9}
    changed = client.patch(path, json={"policy": {"budgets": [budget], "tools": ["python"]}}, headers=root)
    assert changed.status_code == 200
    assert (changed.json()["policy"]["budgets"], changed.json()["policy"]["concurrent"]) == ([budget], 2)
    mine = client.get("/herd/v1/usage", headers=bearer(token)).json()
    assert mine["budgets"] == [budget | {"used": 0, "reserved": 0}]
    end = now_ms() + 60_000
    assert client.patch(path, json={"expires_ms": end}, headers=root).json()["expires_ms"] == end
    assert client.patch(path, json={"policy": {"concurrent": 3}}, headers=root).json()["expires_ms"] == end
    assert client.patch(path, json={"expires_ms": None}, headers=root).json()["expires_ms"] is None
    assert client.patch(path, json={"expires_ms": 7}, headers=root).status_code == 400
    for wrong in ({"policy": {"budgets": 1}}, {"policy": {"digest": "x"}}, {"policy": None}, {"name": "bob"}):
        assert client.patch(path, json=wrong, headers=root).status_code == 400
    assert client.patch(path, json={"policy": {}}, headers=bearer(token)).status_code == 403
    assert client.patch("/herd/v1/keys/abcdefghijkl", json={"policy": {}}, headers=root).status_code == 404
    assert audit_log(store)[-1]["act"] == "change key"


def test_prompts_are_shared_by_administrators(store, client, root):
    _, token = create_key(store, "alice", KeyPolicy(), actor="test")
    path = "/herd/v1/prompts/Support%20team"
    assert client.put(path, json={"text": "Be kind."}, headers=bearer(token)).status_code == 403
    assert client.put(path, json={"text": "Be kind."}, headers=root).json() == {"Support team": "Be kind."}
    assert client.put(path, json={"text": "Be brief."}, headers=root).status_code == 200
    assert client.get("/herd/v1/prompts", headers=bearer(token)).json() == {"Support team": "Be brief."}
    assert client.put("/herd/v1/prompts/%3Cb%3E", json={"text": "x"}, headers=root).status_code == 400
    assert client.put(path, json={"text": "x" * 50_001}, headers=root).status_code == 400
    assert client.put(path, json={"text": ""}, headers=root).json() == {}
