"""`python -m preread` is the `preread` command."""

from preread.cli.main import main

main()
