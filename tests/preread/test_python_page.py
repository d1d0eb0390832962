"""Every Python block of docs/python.md runs, in order and in one program, against real servers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "python.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture
def secured(serving, tmp_path: Path, certificate: tuple[Path, Path]) -> Iterator[dict[str, str]]:
    """A server with TLS and a key: its address and certificate, by what the page calls them."""
    cert, key = map(str, certificate)
    flags = ["--tls-cert-file", cert, "--tls-key-file", key, "--api-key", "rerank:keep-this-one-secret", "--no-encoder"]
    with serving(tmp_path, *flags) as pair:
        yield {"server.example:50051": pair.address, "ca.pem": cert}


def test_the_page_runs(server_pair, secured: dict[str, str], tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)  # the page keeps a store in the directory where it is run
    names = {"127.0.0.1:50051": server_pair.address, "127.0.0.1:50052": server_pair.encoder_address, **secured}
    names |= {"server-a:50051": "127.0.0.1:1", "server-b:50051": server_pair.address}  # one that is down
    known: dict[str, object] = {"__name__": "page"}
    try:
        for number, block in enumerate(BLOCKS, 1):
            text = re.sub("|".join(map(re.escape, names)), lambda match: names[match[0]], block)
            exec(compile(text, f"{PAGE.name}, block {number}", "exec"), known)
    finally:
        known["client"].close()
    lines = capsys.readouterr().out.splitlines()
    assert {"sky stored", "grass stored", "3 stored", "cloud missing None", "order-66"} <= set(lines)
    assert any("colors" in line and "(request " in line for line in lines)
