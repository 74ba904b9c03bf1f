"""Run the command line with `python -m herd`."""

from .cli import main

main()
