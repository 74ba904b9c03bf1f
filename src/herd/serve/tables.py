"""Tables of the store: keys, prices, the ledger's requests and daily sums, the audit log.

Times are integers: milliseconds since 1970 in UTC. Money is in millionths of the store's currency. Days are
texts like 2026-11-27, in UTC. Every column type exists in SQLite and in PostgreSQL.
"""

from __future__ import annotations

from sqlalchemy import JSON, BigInteger, Column, ForeignKey, Index, Integer, MetaData, String, Table, Text

metadata = MetaData()

meta = Table(
    "meta",
    metadata,
    Column("id", Integer, primary_key=True),  # always 1: the table has one row
    Column("schema_version", Integer, nullable=False),
    Column("keys_version", BigInteger, nullable=False),  # grows with every change of a key
    Column("currency", String(8)),
    Column("cache_secret", String(64)),  # for the salts of caches in other servers, hexadecimal
)

servers = Table(
    "servers",
    metadata,
    Column("name", String(128), primary_key=True),
    Column("beats", BigInteger, nullable=False),  # grows as long as the server lives
)

keys = Table(
    "keys",
    metadata,
    Column("id", String(16), primary_key=True),
    Column("name", String(64), nullable=False),
    Column("digest", String(64), nullable=False),  # SHA-256 of the secret, in hexadecimal
    Column("policy", JSON, nullable=False),
    Column("created_ms", BigInteger, nullable=False),
    Column("expires_ms", BigInteger),
    Column("revoked_ms", BigInteger),
)

prices = Table(
    "prices",
    metadata,
    Column("model", String(256), primary_key=True),  # "*": every model without its own price
    Column("prompt", BigInteger, nullable=False),
    Column("cached", BigInteger, nullable=False),
    Column("completion", BigInteger, nullable=False),
)

requests = Table(
    "requests",
    metadata,
    Column("key_id", String(16), ForeignKey("keys.id"), primary_key=True),
    Column("id", String(128), primary_key=True),
    Column("model", String(256), nullable=False),
    Column("endpoint", String(64), nullable=False),
    Column("status", String(16), nullable=False),  # "open" until settled
    Column("day", String(10), nullable=False),
    Column("created_ms", BigInteger, nullable=False),
    Column("settled_ms", BigInteger),
    Column("server", String(128), nullable=False),  # whose counter file has the slot
    Column("slot", Integer, nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("cached_tokens", BigInteger, nullable=False),
    Column("completion_tokens", BigInteger, nullable=False),
    Column("tokens", BigInteger, nullable=False),  # counted per minute: the worst case, then the real number
    Column("reserved_tokens", BigInteger, nullable=False),
    Column("reserved_money", BigInteger, nullable=False),
    Column("price", JSON),  # as it was when the request began
    Column("money", BigInteger, nullable=False),
    Index("requests_by_time", "key_id", "created_ms"),
    Index("requests_by_status", "status", "key_id"),
)

days = Table(
    "days",
    metadata,
    Column("key_id", String(16), ForeignKey("keys.id"), primary_key=True),
    Column("day", String(10), primary_key=True),
    Column("model", String(256), primary_key=True),
    Column("requests", BigInteger, nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),  # of billed requests, cached ones included
    Column("cached_tokens", BigInteger, nullable=False),
    Column("completion_tokens", BigInteger, nullable=False),
    Column("money", BigInteger, nullable=False),
    Column("reserved_tokens", BigInteger, nullable=False),  # of open requests
    Column("reserved_money", BigInteger, nullable=False),
)

prompts = Table(
    "prompts", metadata, Column("name", String(64), primary_key=True), Column("text", Text, nullable=False)
)

audit = Table(
    "audit",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("at_ms", BigInteger, nullable=False),
    Column("actor", String(128), nullable=False),
    Column("act", String(32), nullable=False),
    Column("target", String(256), nullable=False),
    Column("details", JSON, nullable=False),
)
