"""Open everything that a server with keys needs: the store, the check of keys, and the ledger."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .auth import Authenticator, check_binding
from .keys import first_admin_key
from .ledger import Ledger, Unmetered
from .store import Store, shell_actor


@dataclass(frozen=True)
class Accounts:
    """The keys and the ledger of a server. Without a store, everybody may do everything.

    ``first_key`` is the administrator's key that was made now, to be printed once. ``recovered`` is the number of
    requests that a dead server had left open.
    """

    store: Store | None
    authenticator: Authenticator
    ledger: Ledger | Unmetered
    first_key: str | None = None
    recovered: int = 0

    def close(self) -> None:
        """Settle what can be settled, and close the store."""
        self.authenticator.close()
        self.ledger.close()
        if self.store is not None:
            self.store.close()


def open_accounts(place: str | Path | None, host: str) -> Accounts:
    """Open the store at ``place``, or serve without keys if it is None.

    Raises ConfigError if a server without keys would listen to other machines at ``host``.
    """
    check_binding(host, with_keys=place is not None)
    if place is None:
        return Accounts(None, Authenticator(None), Unmetered())
    store = Store(place)
    ledger = Ledger(store)
    recovered = ledger.recover()
    return Accounts(store, Authenticator(store), ledger, first_admin_key(store, shell_actor()), recovered)
