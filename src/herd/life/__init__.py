"""The stages of `herd raise`, from text to a page.

`plan.py` decides, `run.py` keeps what is done, `stages.py` and `measure.py` do it, `show.py` tells.
"""

from .raise_ import raise_herd

__all__ = ["raise_herd"]
