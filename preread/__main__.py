"""`python -m preread` is the `preread` command."""

from preread_cli.main import main

main()
