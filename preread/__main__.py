"""`python -m preread` is the `preread` command, where the server is installed."""

import sys

try:
    from preread_cli.main import main
except ModuleNotFoundError as exc:
    if exc.name != "preread_cli":
        raise
    sys.exit("preread: error: the command comes with the server: pip install 'preread[server]'")

main()
