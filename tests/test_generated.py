"""The committed stubs and the sync client are what their sources generate."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_stubs_are_those_of_the_contract(tmp_path):
    subprocess.run([ROOT / "scripts" / "generate-stubs", tmp_path], check=True)

    fresh = {path.name: path.read_bytes() for path in (tmp_path / "preread" / "v1").iterdir()}
    committed = {path.name: path.read_bytes() for path in (ROOT / "preread" / "v1").glob("*_pb2*")}
    assert fresh == committed


def test_the_sync_client_is_that_of_the_async_one(tmp_path):
    subprocess.run([ROOT / "scripts" / "generate-client", tmp_path], check=True)

    assert (tmp_path / "preread" / "sync.py").read_text() == (ROOT / "preread" / "sync.py").read_text()
