"""Record measured numbers as receipts (`receipt.py`) and show a run as an HTML page (`page.py`).

Needs no torch, so a page can be rebuilt on any machine.
"""

from .receipt import Receipt, Value, read_receipts, write_receipt

__all__ = ["Receipt", "Value", "read_receipts", "write_receipt"]
