"""What was measured and how it is shown: receipts (`receipt.py`), the page of a run (`page.py`, `charts.py`), README
tables and pictures (`tables.py`, `picture.py`). Needs no torch, so a report can be rebuilt anywhere.
"""

from .receipt import Receipt, Value, read_receipts, write_receipt

__all__ = ["Receipt", "Value", "read_receipts", "write_receipt"]
