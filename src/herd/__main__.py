"""`python -m herd` is `herd`."""

from .cli import main

main()
