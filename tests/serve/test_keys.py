"""Keys: text, storage, limits, names, prices, and `herd keys` as a user types it."""

import csv
import io
import json
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from herd import cli
from herd.errors import ConfigError
from herd.serve import keys, prices
from herd.serve.keys import KeyPolicy, create_key, find_key, list_keys, parse_budget, revoke_key, rotate_key
from herd.serve.prices import TokenPrice, format_money, parse_money
from herd.serve.store import Store, audit_log, now_ms
from herd.serve.usage import DayUsage, usage_csv


def test_the_secret_is_not_in_the_store(store):
    _, token = create_key(store, "alice", KeyPolicy(), actor="test")
    secret = token.rpartition("-")[2]
    assert len(secret) == 43
    for path in store.path.parent.iterdir():
        assert secret.encode() not in path.read_bytes()


def test_a_key_is_recognized_by_its_whole_text_only(store):
    info, token = create_key(store, "alice", KeyPolicy(), actor="test")
    found = keys.verify_token(store, token)
    assert found is not None
    assert found[0] == info
    wrong = [
        token[:-1],
        token + "a",
        token.upper(),
        token.replace("herd", "herb"),
        token[:-1] + "!",
        f" {token}",
    ]
    wrong += [
        f"herd-{info.id}-{info.digest[:43]}",
        f"herd-{'a' * 12}-{token.rpartition('-')[2]}",
        info.digest,
    ]
    for text in wrong:
        assert keys.verify_token(store, text) is None, text


def test_keys_that_share_an_id_s_prefix_or_a_digest_s_prefix_do_not_mix(store, monkeypatch):
    ids = iter("aaaaaaaaaaaa" + "aaaaaaaaaaab")
    secrets = iter("B" * 43 + "B" * 42 + "C")

    def choice(letters):
        return next(
            ids if string.ascii_lowercase in letters and string.ascii_uppercase not in letters else secrets
        )

    monkeypatch.setattr(keys.secrets, "choice", choice)
    tokens = [create_key(store, name, KeyPolicy(), actor="test")[1] for name in ("one", "two")]
    monkeypatch.setattr(keys, "_digest", lambda secret: "ab" * 16 + secret[-1] * 32)
    for name, token in zip(("one", "two"), tokens, strict=True):
        rotated = find_key(store, name)
        with store.write() as connection:
            query = keys.keys.update().where(keys.keys.c.id == rotated.id)
            connection.execute(query.values(digest=keys._digest(token)))
    for name, token in zip(("one", "two"), tokens, strict=True):
        assert keys.verify_token(store, token)[0].name == name
    crossed = tokens[0][:-1] + tokens[1][-1]
    assert keys.verify_token(store, crossed) is None


def test_digests_are_compared_in_constant_time_also_for_unknown_ids(store, monkeypatch):
    compared = []
    compare = keys.hmac.compare_digest
    monkeypatch.setattr(keys.hmac, "compare_digest", lambda a, b: compared.append((a, b)) or compare(a, b))
    _, token = create_key(store, "alice", KeyPolicy(), actor="test")
    keys.verify_token(store, token)
    keys.verify_token(store, f"herd-{'z' * 12}-{'A' * 43}")
    assert len(compared) == 2
    assert {len(text) for pair in compared for text in pair} == {64}


def test_rotation_ends_the_old_text_and_keeps_the_key(store):
    info, old = create_key(store, "alice", KeyPolicy(concurrent=3), actor="test")
    rotated, new = rotate_key(store, "alice", actor="test")
    assert keys.verify_token(store, old) is None
    assert keys.verify_token(store, new)[0] == rotated
    assert (rotated.id, rotated.policy) == (info.id, info.policy)


def test_a_revoked_key_stays_revoked_and_frees_its_name(store):
    info, _ = create_key(store, "alice", KeyPolicy(), actor="test")
    first = revoke_key(store, "alice", actor="test")
    assert first.state(now_ms()) == "revoked"
    assert revoke_key(store, info.id, actor="test").revoked_ms == first.revoked_ms
    with pytest.raises(ConfigError, match="was revoked"):
        rotate_key(store, info.id, actor="test")
    second, _ = create_key(store, "alice", KeyPolicy(), actor="test")
    assert find_key(store, "alice") == second


def test_a_name_is_taken_once(store):
    create_key(store, "alice", KeyPolicy(), actor="test")
    with pytest.raises(ConfigError, match="exists"):
        create_key(store, "alice", KeyPolicy(), actor="test")


@pytest.mark.parametrize(
    "name",
    [
        "",
        "=cmd|' /C calc'!A0",
        "+1",
        "-1",
        "@SUM(A1)",
        "a\nb",
        "a\r",
        "\x1b[31mred",
        "a\x00",
        "a" * 65,
        "a\u202eb",
        "a,b",
        'a"b',
        "<b>",
        "\ttab",
        "a\u2028b",
    ],
)
def test_names_that_could_inject_into_logs_or_sheets_are_refused(store, name):
    with pytest.raises(ConfigError, match="key name"):
        create_key(store, name, KeyPolicy(), actor="test")
    assert list_keys(store) == []


@given(st.text(max_size=70))
def test_every_accepted_name_is_one_printable_line(name):
    if keys._NAME.fullmatch(name):
        assert name.isprintable()
        assert name[0].isalnum()
        assert not set(name) & set("\r\n,;\"'=<>|")


def test_the_default_cache_group_belongs_to_one_key(store):
    alone, _ = create_key(store, "alone", KeyPolicy(), actor="test")
    impostor, _ = create_key(store, "impostor", KeyPolicy(cache_group=alone.id), actor="test")
    team = [create_key(store, name, KeyPolicy(cache_group="team"), actor="test")[0] for name in ("a", "b")]
    assert team[0].cache_group == team[1].cache_group
    assert len({info.cache_group for info in (alone, impostor, *team)}) == 3


def test_the_first_admin_key_is_made_once(store):
    token = keys.first_admin_key(store, "test")
    assert "admin" in keys.verify_token(store, token)[0].policy.scopes
    revoke_key(store, "admin", "test")
    assert keys.first_admin_key(store, "test") is None


def test_acts_of_administrators_are_in_the_audit_log(store):
    create_key(store, "alice", KeyPolicy(), actor="shell:me")
    rotate_key(store, "alice", actor="key:abc")
    revoke_key(store, "alice", actor="key:abc")
    prices.set_price(store, "m", TokenPrice(1, 2, 3), "EUR", "shell:me")
    log = [(row["actor"], row["act"]) for row in audit_log(store)]
    assert log == [
        ("shell:me", "create key"), ("key:abc", "rotate key"), ("key:abc", "revoke key"), ("shell:me", "set price")
    ]  # fmt: skip


@given(st.integers(0, 10**15))
def test_money_survives_being_printed_and_read(micro):
    assert parse_money(format_money(micro)) == micro


@pytest.mark.parametrize("text", ["", "x", "-1", "0.0000001", "nan", "inf", "1e99", "1,5"])
def test_amounts_that_would_be_rounded_or_are_none_are_refused(text):
    with pytest.raises(ConfigError, match="amount of money"):
        parse_money(text)


@given(st.builds(TokenPrice, *[st.integers(0, 10**9)] * 3), *[st.integers(0, 10**6)] * 3)
def test_no_request_costs_more_than_its_worst_case(price, prompt, cached, completion):
    cached = min(cached, prompt)
    exact = (prompt - cached) * price.prompt + cached * price.cached + completion * price.completion
    cost = price.cost(prompt, cached, completion)
    assert 0 <= cost * prices.MICRO - exact < prices.MICRO
    assert cost <= price.worst_cost(prompt, completion + 7)


def test_a_store_has_one_currency(store):
    prices.set_price(store, "m", TokenPrice(1, 1, 1), "EUR", "test")
    with pytest.raises(ConfigError, match="counts in EUR"):
        prices.set_price(store, "n", TokenPrice(1, 1, 1), "USD", "test")
    with pytest.raises(ConfigError, match="three letters"):
        prices.set_price(store, "n", TokenPrice(1, 1, 1), "=EU", "test")


@pytest.mark.parametrize(
    "text, budget, currency",
    [
        ("500_000 tokens/day", {"unit": "tokens", "period": "day", "amount": 500_000}, ""),
        ("20.50 EUR/month", {"unit": "money", "period": "month", "amount": 20_500_000}, "EUR"),
    ],
)
def test_budgets_are_read(text, budget, currency):
    parsed, unit = parse_budget(text)
    assert (parsed.model_dump(), unit) == (budget, currency)


@pytest.mark.parametrize(
    "text", ["", "5", "5 tokens", "5.5 tokens/day", "5 tokens/year", "-5 tokens/day", "1.2.3 EUR/day"]
)
def test_budgets_that_cannot_be_read_are_refused(text):
    with pytest.raises(ConfigError):
        parse_budget(text)


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@x", "\t=1", "a\r\nb", "\x1b[0m"])
def test_csv_cells_cannot_be_formulas_or_new_rows(text):
    row = DayUsage("2026-11-27", "abc", text, text, 1, 2, 3, 4, 5, 6, 7)
    rows = list(csv.reader(io.StringIO(usage_csv([row], "EUR"), newline="")))
    assert len(rows) == 2
    assert all(cell[:1] not in "=+-@\t\r" or cell == "" for cell in rows[1])
    assert all(cell.isprintable() for cell in rows[1])


def run(capsys, *words: str) -> tuple[int, str, str]:
    code = cli.run(["keys", *words])
    return code, *capsys.readouterr()


def test_the_verb_from_creating_to_revoking(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HERD_STORE", str(tmp_path / "s.db"))
    code, out, err = run(
        capsys, "create", "alice", "--budget", "20 EUR/month", "--model", "m", "--expires", "90d"
    )
    assert code == 0, err
    token = out.strip()
    code, out, _ = run(capsys, "list", "--json")
    (listed,) = json.loads(out)
    assert listed["name"] == "alice"
    assert listed["policy"]["models"] == ["m"]
    assert token.startswith(f"herd-{listed['id']}-")
    assert "digest" not in out
    assert token.rpartition("-")[2] not in out
    code, out, _ = run(capsys, "rotate", "alice")
    assert code == 0
    assert out.strip() != token
    assert run(capsys, "price", "m", "--prompt", "0.15", "--completion", "0.6")[0] == 0
    assert "0.15" in run(capsys, "price")[1]
    assert run(capsys, "usage", "--csv")[1].startswith("day,key_id,key_name,model,requests")
    assert run(capsys, "usage")[1] == "nothing was used\n"
    assert run(capsys, "backup", str(tmp_path / "copy.db"))[0] == 0
    assert run(capsys, "revoke", "alice")[0] == 0
    assert "no keys" in run(capsys, "list")[1]
    assert "alice" in run(capsys, "list", "--all")[1]
    assert "revoke key" in run(capsys, "log")[1]
    assert [key.name for key in list_keys(Store(tmp_path / "copy.db"))] == ["alice"]


def test_everything_that_a_key_was_created_with_can_be_changed_and_taken_back(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HERD_STORE", str(tmp_path / "s.db"))
    options = {
        "--model": ("m", {"models": ["m"]}), "--scope": ("chat,models", {"scopes": ["chat", "models"]}),
        "--cache-group": ("team", {"cache_group": "team"}), "--requests-per-minute": ("7", {"requests_per_minute": 7}),
        "--tokens-per-minute": ("70", {"tokens_per_minute": 70}), "--concurrent": ("3", {"concurrent": 3}),
        "--budget": ("20 usd/Month", {"budgets": [{"unit": "money", "period": "month", "amount": 20_000_000}]}),
        "--tools": ("python", {"tools": ["python"]}),
    }  # fmt: skip
    words = [word for name, (value, _) in options.items() for word in (name, value)]
    created, plain = ({}, {})
    assert run(capsys, "create", "alice", "--expires", "2999-01-01", *words)[0] == 0
    assert run(capsys, "create", "bob")[0] == 0
    alice, bob = json.loads(run(capsys, "list", "--json")[1])
    created, plain = alice["policy"], bob["policy"]
    changed: dict = {}
    for name, (value, fields) in options.items():
        assert run(capsys, "change", "bob", name, value)[0] == 0
        changed |= fields
        policy = json.loads(run(capsys, "list", "--json")[1])[1]["policy"]
        assert {key: sorted(policy[key]) if isinstance(policy[key], list) and key != "budgets" else policy[key]
                for key in changed} == changed  # fmt: skip
    assert {**policy, "scopes": sorted(policy["scopes"])} == {**created, "scopes": sorted(created["scopes"])}
    for name in options:
        assert (
            run(capsys, "change", "bob", name, "0" if name.endswith(("minute", "concurrent")) else "")[0] == 0
        )
    policy = json.loads(run(capsys, "list", "--json")[1])[1]["policy"]
    assert {**policy, "scopes": sorted(policy["scopes"])} == {**plain, "scopes": sorted(plain["scopes"])}
    assert "expires 2999-01-02" in run(capsys, "change", "bob", "--expires", "2999-01-01")[1]
    assert "20.00 USD/month" in run(capsys, "change", "alice", "--expires", "never")[1]
    assert [key["expires_ms"] is None for key in json.loads(run(capsys, "list", "--json")[1])] == [
        True,
        False,
    ]
    assert "already have expired" in run(capsys, "change", "bob", "--expires", "2020-01-01")[2]
    run(capsys, "change", "bob", "--admin")
    assert "admin" in run(capsys, "list")[1]


@pytest.mark.parametrize(
    "words, message",
    [
        (["create", "a", "--scope", "root"], "scopes"),
        (["create", "a", "--admin", "--scope", "chat"], "leave out --scope"),
        (["create", "a", "--budget", "lots"], "lots"),
        (["create", "a", "--budget", "20 dollars/month"], "'dollars' must be tokens or a currency"),
        (["create", "a", "--budget", "20 EUR/week"], "the period 'week' must be day or month"),
        (["create", "a", "--budget", "2.5 tokens/day"], "'2.5' must be a whole number"),
        (["create", "a", "--budget", "1__x tokens/day"], "1__x"),
        (["create", "a", "--budget", "-1 EUR/day"], "'-1' is not an amount"),
        (["create", "a", "--budget", "1 EUR/day", "--budget", "1 USD/day"], "one currency"),
        (["create", "a", "--expires", "soon"], "soon"),
        (["create", "a", "--expires", "2020-01-01"], "already have expired"),
        (["create", "a", "--expires", "9999-12-31"], "9999-12-31"),
        (["create", "a", "--concurrent", "-1"], "--concurrent"),
        (["create", "a", "--cache-group", "no spaces"], "cache_group"),
        (["revoke", "nobody"], "nobody"),
        (["change", "nobody", "--concurrent", "1"], "nobody"),
        (["change", "nobody"], "name what to change"),
        (["price", "m", "--prompt", "1"], "--completion"),
        (["usage", "--since", "yesterday"], "yesterday"),
    ],
)
def test_wrong_words_are_refused_in_one_line_and_change_nothing(
    tmp_path, monkeypatch, capsys, words, message
):
    monkeypatch.setenv("HERD_STORE", str(tmp_path / "s.db"))
    code, out, err = run(capsys, *words)
    assert code in (1, 2)
    assert message in err
    assert out == ""
    assert "no keys" in run(capsys, "list", "--all")[1]
