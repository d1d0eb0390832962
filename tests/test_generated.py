"""The committed stubs are what the contract in proto/ generates."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_stubs_are_those_of_the_contract(tmp_path):
    subprocess.run([ROOT / "scripts" / "generate-stubs", tmp_path], check=True)

    fresh = {path.name: path.read_bytes() for path in (tmp_path / "preread" / "v1").iterdir()}
    committed = {path.name: path.read_bytes() for path in (ROOT / "preread" / "v1").glob("*_pb2*")}
    assert fresh == committed
