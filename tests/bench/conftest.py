"""Make the scripts of bench/ importable, and the example run of the report's tests."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "bench"), str(ROOT / "tests" / "report")]
