"""How measured numbers are recorded and shown: receipts (`receipt.py`) and the HTML page of a run
(`page.py`).

Needs no torch, so a page can be rebuilt on any machine.
"""

from .receipt import Receipt, Value, read_receipts, write_receipt

__all__ = ["Receipt", "Value", "read_receipts", "write_receipt"]
