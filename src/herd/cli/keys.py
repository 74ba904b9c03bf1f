"""`herd keys`: the keys of `herd serve`, their limits, budgets and prices, and what was used."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError
from .common import Json, print_json, print_table

if TYPE_CHECKING:
    from pydantic import ValidationError

    from ..serve.keys import KeyInfo
    from ..serve.store import Store

HELP = "Manage the keys of `herd serve`: create, list, change, revoke, rotate, prices, usage, backup."
app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, help=HELP)
STORE_HELP = "File or URL of the keys (default: HERD_STORE, or ~/.local/share/herd/serve.db)."
Place = Annotated[str | None, typer.Option("--store", help=STORE_HELP)]
Key = Annotated[str, typer.Argument(help="The key's name or id.")]


Models = Annotated[
    list[str], typer.Option("--model", help="Allow only this model ('': every one). Repeatable.")
]
Scopes = Annotated[
    list[str],
    typer.Option(
        "--scope",
        help="Allow only these routes: chat, completions, responses, messages, ollama, embeddings, tokenize, "
        "models, usage, metrics, admin. Repeatable (default, or '': all but the last two).",
    ),
]
Admin = Annotated[bool, typer.Option("--admin", help="Allow everything, also keys and metrics.")]
CacheGroup = Annotated[
    str | None,
    typer.Option(help="Share cached prompts with the keys of this group (default, or '': with none)."),
]
RequestsPerMinute = Annotated[
    int | None, typer.Option(min=0, help="Most requests in 60 seconds (0: no limit).")
]
TokensPerMinute = Annotated[int | None, typer.Option(min=0, help="Most tokens in 60 seconds (0: no limit).")]
Concurrent = Annotated[int | None, typer.Option(min=0, help="Most requests at the same time (0: no limit).")]
Budgets = Annotated[
    list[str], typer.Option("--budget", help="'500000 tokens/day', '20 EUR/month' ('': none). Repeatable.")
]
Tools = Annotated[
    list[str],
    typer.Option(
        "--tools",
        help="Tools on the server that it may use, e.g. calculator,python,files ('': none). Repeatable.",
    ),
]
Expires = Annotated[
    str | None, typer.Option(help="A day such as 2027-01-31, a duration such as 90d, or never.")
]


@app.command("create")
def create_command(
    name: Annotated[str, typer.Argument(help="A name for people, e.g. alice or build-server.")],
    models: Models = [],
    scopes: Scopes = [],
    admin: Admin = False,
    cache_group: CacheGroup = None,
    requests_per_minute: RequestsPerMinute = None,
    tokens_per_minute: TokensPerMinute = None,
    concurrent: Concurrent = None,
    budgets: Budgets = [],
    tools: Tools = [],
    expires: Expires = None,
    place: Place = None,
    as_json: Json = False,
) -> None:
    """Create a key and print it. It is stored as a hash, so this is the only time that it is shown."""
    from pydantic import ValidationError

    from ..serve.keys import KeyPolicy, create_key

    limits = requests_per_minute, tokens_per_minute, concurrent
    fields, currency = _policy_fields(models, scopes, admin, cache_group, limits, budgets, tools)
    try:
        policy = KeyPolicy(**fields)
    except ValidationError as error:
        raise _malformed(error) from None
    end = _expiry(expires)
    made = _with_store(
        place,
        lambda store, actor: create_key(store, name, policy, actor=actor, expires_ms=end, currency=currency),
    )
    _print_new(made, as_json)


@app.command("list")
def list_command(
    all_keys: Annotated[bool, typer.Option("--all", help="List also revoked and expired keys.")] = False,
    place: Place = None,
    as_json: Json = False,
) -> None:
    """List the keys with their limits."""
    from ..serve.keys import list_keys
    from ..serve.prices import read_prices
    from ..serve.store import now_ms

    def work(store: Store, actor: str) -> tuple[list[KeyInfo], str | None]:
        return list_keys(store), read_prices(store)[1]

    infos, currency = _with_store(place, work)
    infos = [info for info in infos if all_keys or info.state(now_ms()) == "active"]
    if as_json:
        print_json([_as_json(info) for info in infos])
    elif not infos:
        print("no keys; create one with: herd keys create NAME")
    else:
        rows = []
        for info in infos:
            expires = _time(info.expires_ms) or "never"
            rows.append([info.id, info.name, info.state(now_ms()), expires, _limits(info, currency)])
        print_table(["id", "name", "state", "expires", "limits"], rows, left=5)


@app.command("change")
def change_command(
    key: Key,
    models: Models = [],
    scopes: Scopes = [],
    admin: Admin = False,
    cache_group: CacheGroup = None,
    requests_per_minute: RequestsPerMinute = None,
    tokens_per_minute: TokensPerMinute = None,
    concurrent: Concurrent = None,
    budgets: Budgets = [],
    tools: Tools = [],
    expires: Expires = None,
    place: Place = None,
    as_json: Json = False,
) -> None:
    """Change what a key allows. What is not named stays, and so does its secret."""
    from pydantic import ValidationError

    from ..serve.keys import change_key
    from ..serve.prices import read_prices

    limits = requests_per_minute, tokens_per_minute, concurrent
    fields, currency = _policy_fields(models, scopes, admin, cache_group, limits, budgets, tools)
    if not fields and expires is None:
        raise typer.BadParameter("name what to change, e.g. --budget or --expires")
    end = ... if expires is None else _expiry(expires)

    def work(store: Store, actor: str) -> tuple[KeyInfo, str | None]:
        return change_key(store, key, fields, actor, currency, end), read_prices(store)[1]

    try:
        info, unit = _with_store(place, work)
    except ValidationError as error:
        raise _malformed(error) from None
    if as_json:
        print_json(_as_json(info))
    else:
        until = f"; expires {_time(info.expires_ms)}" if info.expires_ms else ""
        print(f"changed {info.name} ({info.id}): {_limits(info, unit)}{until}")


@app.command("revoke")
def revoke_command(key: Key, place: Place = None) -> None:
    """Revoke a key forever. Answers that it has open end within a second."""
    from ..serve.keys import revoke_key

    info = _with_store(place, lambda store, actor: revoke_key(store, key, actor))
    print(f"revoked {info.name} ({info.id})")


@app.command("rotate")
def rotate_command(key: Key, place: Place = None, as_json: Json = False) -> None:
    """Give a key a new secret and print it. The old one stops working at once. Limits and usage stay."""
    from ..serve.keys import rotate_key

    _print_new(_with_store(place, lambda store, actor: rotate_key(store, key, actor)), as_json)


@app.command("price")
def price_command(
    model: Annotated[
        str | None, typer.Argument(help="A served model; '*' for all without their own price.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="Money for a million new prompt tokens, e.g. 0.15.")
    ] = None,
    cached: Annotated[
        str | None, typer.Option(help="For a million cached ones (default: as --prompt).")
    ] = None,
    completion: Annotated[str | None, typer.Option(help="For a million generated tokens.")] = None,
    currency: Annotated[
        str | None, typer.Option(help="Three letters (default: the store's, or EUR).")
    ] = None,
    place: Place = None,
    as_json: Json = False,
) -> None:
    """Set the price of a model, or list all prices if no model is named."""
    from ..serve.prices import TokenPrice, format_money, parse_money, read_prices, set_price

    def work(store: Store, actor: str) -> tuple[dict[str, TokenPrice], str | None]:
        if model is not None:
            if prompt is None or completion is None:
                raise ConfigError(f"the price of {model}: give --prompt and --completion")
            price = TokenPrice(parse_money(prompt), parse_money(cached or prompt), parse_money(completion))
            set_price(store, model, price, currency or read_prices(store)[1] or "EUR", actor)
        return read_prices(store)

    table, unit = _with_store(place, work)
    rows = [
        [name, *(format_money(money) for money in (price.prompt, price.cached, price.completion))]
        for name, price in table.items()
    ]
    if as_json:
        names = ("model", "prompt", "cached", "completion")
        print_json([dict(zip(names, row, strict=True)) | {"currency": unit} for row in rows])
    elif rows:
        print_table([f"{unit} per million tokens", "prompt", "cached", "completion"], rows)
    else:
        print("no prices; set one with: herd keys price MODEL --prompt 0.15 --completion 0.60")


@app.command("usage")
def usage_command(
    key: Annotated[str | None, typer.Argument(help="Only this key's usage (name or id).")] = None,
    since: Annotated[str | None, typer.Option(help="First day, e.g. 2026-11-01 (UTC).")] = None,
    until: Annotated[str | None, typer.Option(help="Last day (UTC).")] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    place: Place = None,
    as_json: Json = False,
) -> None:
    """Print what was used by day, key and model."""
    from ..serve.keys import find_key
    from ..serve.prices import format_money, read_prices
    from ..serve.usage import DayUsage, read_usage, usage_csv

    def work(store: Store, actor: str) -> tuple[list[DayUsage], str | None]:
        key_id = None if key is None else find_key(store, key).id
        return read_usage(store, since=since, until=until, key_id=key_id), read_prices(store)[1]

    rows, currency = _with_store(place, work)
    if as_csv:
        print(usage_csv(rows, currency).replace("\r\n", "\n"), end="")
    elif as_json:
        print_json([vars(row) | {"currency": currency} for row in rows])
    elif not rows:
        print("nothing was used")
    else:
        header = ["day", "key", "model", "requests", "prompt", "cached", "completion", currency or "money"]
        counts = ("requests", "prompt_tokens", "cached_tokens", "completion_tokens")
        table = []
        for row in rows:
            used = [f"{getattr(row, name):,}" for name in counts]
            table.append([row.day, row.key_name, row.model, *used, format_money(row.money)])
        print_table(header, table, left=3)


@app.command("log")
def log_command(place: Place = None, as_json: Json = False) -> None:
    """Print the audit log: who created, rotated or revoked keys and set prices."""
    from ..serve.store import audit_log

    rows = _with_store(place, lambda store, actor: audit_log(store))
    if as_json:
        print_json(rows)
        return
    table = []
    for row in rows:
        details = " ".join(map(str, row["details"].values()))
        table.append([_time(row["at_ms"]), row["actor"], row["act"], row["target"], details])
    if table:
        print_table(["time (UTC)", "who", "act", "what", "details"], table, left=5)


@app.command("backup")
def backup_command(
    file: Annotated[Path, typer.Argument(help="A new file for the copy.")], place: Place = None
) -> None:
    """Copy keys and ledger to a file, also while a server uses them. To restore, put the copy in place."""
    _with_store(place, lambda store, actor: store.backup(file))
    print(file)


def _with_store(place: str | None, work: Callable[[Store, str], Any]) -> Any:
    """Open the store, call ``work(store, actor)``, close the store, and return the result."""
    from ..serve.store import Store, default_store, shell_actor

    store = Store(place or default_store())
    try:
        return work(store, shell_actor())
    finally:
        store.close()


def _policy_fields(
    models: list[str],
    scopes: list[str],
    admin: bool,
    cache_group: str | None,
    limits: tuple[int | None, int | None, int | None],
    budgets: list[str],
    tools: list[str],
) -> tuple[dict[str, Any], str]:
    """Return the fields of a policy that options name, and the currency of its budgets ("" for tokens).

    An empty text and a limit of 0 stand for the default. ``limits`` are per minute of requests and tokens,
    and at once.
    """
    from ..serve.keys import SCOPES, USER_SCOPES, parse_budget

    if admin and scopes:
        raise typer.BadParameter("--admin allows every route: leave out --scope")
    parsed = [parse_budget(text) for text in budgets if text]
    currencies = {currency for _, currency in parsed if currency}
    if len(currencies) > 1:
        raise typer.BadParameter(f"--budget: one currency for all, not {' and '.join(sorted(currencies))}")
    names = ("requests_per_minute", "tokens_per_minute", "concurrent")
    fields: dict[str, Any] = {
        name: limit or None for name, limit in zip(names, limits, strict=True) if limit is not None
    }
    if admin or scopes:
        fields["scopes"] = SCOPES if admin else _names(scopes) or USER_SCOPES
    if models:
        fields["models"] = [name for name in models if name] or None
    if cache_group is not None:
        fields["cache_group"] = cache_group or None
    if budgets:
        fields["budgets"] = [budget for budget, _ in parsed]
    if tools:
        fields["tools"] = _names(tools)
    return fields, "".join(currencies)


def _malformed(error: ValidationError) -> typer.BadParameter:
    """Return the first problem of a policy, in one line."""
    first = error.errors()[0]
    return typer.BadParameter(f"{'.'.join(map(str, first['loc'][:1]))}: {first['msg']}")


def _names(texts: list[str]) -> list[str]:
    """Return names that are separated by commas."""
    return [name.strip() for text in texts for name in text.split(",") if name.strip()]


def _expiry(text: str | None) -> int | None:
    """Return the time in ms that a day (its end, UTC) or a duration such as 90d or 12h means. never: None."""
    if text is None or text == "never":
        return None
    if match := re.fullmatch(r"(\d{1,5})([dhm])", text):
        unit = {"d": "days", "h": "hours", "m": "minutes"}[match[2]]
        end = datetime.now(UTC) + timedelta(**{unit: int(match[1])})
    else:
        try:
            end = datetime.strptime(text, "%Y-%m-%d").replace(tzinfo=UTC) + timedelta(days=1)
        except (ValueError, OverflowError):
            raise ConfigError(
                f"--expires {text}: write a day such as 2027-01-31, a duration such as 90d, or never"
            ) from None
    return int(end.timestamp() * 1000)


def _print_new(made: tuple[KeyInfo, str], as_json: bool) -> None:
    info, token = made
    if as_json:
        print_json(_as_json(info) | {"key": token})
        return
    print(token)
    typer.echo(f"key {info.name} ({info.id}): keep the line above, it is not shown again", err=True)


def _as_json(info: KeyInfo) -> dict[str, Any]:
    from ..serve.keys import public_view

    return public_view(info)


def _time(ms: int | None) -> str:
    return "" if ms is None else datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y-%m-%d %H:%M")


def _limits(info: KeyInfo, currency: str | None) -> str:
    """Return scopes, models, limits and budgets in a few words."""
    from ..serve.keys import USER_SCOPES
    from ..serve.prices import format_money

    policy = info.policy
    parts = ["admin"] if "admin" in policy.scopes else []
    if not parts and policy.scopes != USER_SCOPES:
        parts.append(f"only {', '.join(sorted(policy.scopes))}")
    if policy.models is not None:
        parts.append(f"model {', '.join(sorted(policy.models))}")
    for limit, words in (
        (policy.requests_per_minute, "requests/min"),
        (policy.tokens_per_minute, "tokens/min"),
        (policy.concurrent, "at once"),
    ):
        if limit is not None:
            parts.append(f"{limit:,} {words}")
    for budget in policy.budgets:
        money = f"{format_money(budget.amount)} {currency}"
        amount = f"{budget.amount:,} tokens" if budget.unit == "tokens" else money
        parts.append(f"{amount}/{budget.period}")
    if policy.tools:
        parts.append(f"tools {', '.join(sorted(policy.tools))}")
    return "; ".join(parts) or "none"
