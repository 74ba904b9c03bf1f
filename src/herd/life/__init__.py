"""The stages of `herd raise`, from text to a report.

`plan.py` chooses the sizes, `run.py` records the stages, `stages.py` and `measure.py` do the work, and
`show.py` displays the progress.
"""

from .raise_ import raise_herd

__all__ = ["raise_herd"]
