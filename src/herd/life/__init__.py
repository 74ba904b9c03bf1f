"""The stages of `herd raise`, from text to a report.

`plan.py` decides the sizes, `run.py` records the stages, `stages.py` and `measure.py` do the work, `show.py`
shows it.
"""

from .raise_ import raise_herd

__all__ = ["raise_herd"]
