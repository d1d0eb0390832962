"""`preread`: one name in front of every command. Knows which commands exist and how they fail, not what they do.

A command lives in preread_cli/<name>.py and exposes `command`. It is imported when it is called,
so `preread --help` and the clients' commands never wait for torch.
"""

from __future__ import annotations

import errno
import importlib
import io
import os
import sys
from typing import Any

import click

from preread_cli.config_file import without_users
from preread_cli.failures import explain
from preread_cli.options import option

# Section -> command -> what it does, in the order a newcomer meets them.
COMMANDS: dict[str, dict[str, str]] = {
    "Passages, once": {
        "index": "Read passages from files and store their states.",
        "encode-worker": "Keep an encoder running for other machines to send passages to.",
    },
    "Queries, many times": {
        "serve": "Start the reranking server.",
        "warm": "Have a server compute ahead what queries over some passages will need.",
        "rerank": "Rank passages for a query, or for a file of queries.",
        "tune": "Choose stored ratio, codec and read ratio by measuring them.",
        "evaluate": "Measure how well a checkpoint reranks a judged collection.",
    },
    "Looking after it": {
        "stats": "Show what the store holds.",
        "verify": "Read a whole collection back and report damage.",
        "collection": "Point an alias at a collection, compact, re-encode or drop it.",
        "checkpoint": "Describe a checkpoint, or make a random one.",
        "check": "Check whether a model's scores are the right ones.",
        "convert-ctxl": "Convert a ctxl reranker to a classifier.",
        "doctor": "Check whether this machine, checkpoint and store can serve.",
        "health": "Ask a server, of either kind, whether it is ready.",
    },
}


class LazyGroup(click.Group):
    """Imports a command when it is called, and turns every error into one line and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for section in COMMANDS.values() for name in section]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        module = importlib.import_module(f"preread_cli.{cmd_name.replace('-', '_')}")
        command: click.Command = module.command
        command.name = cmd_name
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for section, commands in COMMANDS.items():
            with formatter.section(section):
                formatter.write_dl(list(commands.items()))

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except click.ClickException as exc:
            # Click quotes what it did not expect: a store URL whose flag was forgotten.
            exc.message = without_users(exc.message)  # type: ignore[misc]  # final in its stubs
            raise
        except (click.exceptions.Exit, click.Abort):
            raise
        except (Exception, KeyboardInterrupt) as exc:
            if isinstance(exc, OSError) and exc.errno == errno.EPIPE:
                raise  # the reader of our output left: click ends quietly
            raise explain(exc, debug=bool(ctx.params.get("debug"))) from exc


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="preread", prog_name="preread")
@option("--debug", is_flag=True, help="Show where an error came from.")
def cli(debug: bool) -> None:
    """Rerank with a model that has read your passages before the query comes.

    \b
    In two steps:
      preread index passages.jsonl --collection docs     once, slow
      preread serve                                      then this answers

    \b
    and, while it runs, in another terminal:
      preread rerank "why is the sky blue" --collection docs

    Every option can also be set in the environment: --store is PREREAD_STORE.
    `preread COMMAND --help` explains one command.
    """


def main() -> None:
    """The console script."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # begun without it: the next socket would take its number, and get what is printed
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free, which is this one
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":  # an odd locale must not end a command
            stream.reconfigure(errors="backslashreplace")
    cli(prog_name="preread")


if __name__ == "__main__":
    main()
