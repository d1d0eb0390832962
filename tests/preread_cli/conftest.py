"""A client of the served pair, whose collection holds a module's passages, and the command next to it."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from preread import Client, Passage
from preread_cli.main import cli


@pytest.fixture(scope="module")
def client(request, server_pair):
    """The module's five PASSAGES are in its COLLECTION."""
    passages = [Passage(*pair) for pair in request.module.PASSAGES.items()]
    with Client(server_pair.address, encoder_address=server_pair.encoder_address) as client:
        assert len(list(client.upsert(passages, collection=request.module.COLLECTION))) == 5
        yield client


@pytest.fixture
def command(server_pair, client):
    """Runs `preread NAME` against the served pair."""

    def run(name: str, *arguments: str, stdin: str | None = None):
        return CliRunner().invoke(cli, [name, *arguments, "--address", server_pair.address], input=stdin)

    return run
