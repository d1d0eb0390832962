"""Certificate files of a gRPC server."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import grpc

from preread_edge.access import join


@dataclass(frozen=True)
class ServerTls:
    """PEM files; nothing set: plain text. With client_ca_file callers must show a certificate of that authority."""

    cert_file: str = ""
    key_file: str = ""
    client_ca_file: str = ""

    def __post_init__(self) -> None:
        if bool(self.cert_file) != bool(self.key_file):
            given, missing = ("cert", "key") if self.cert_file else ("key", "cert")
            raise ValueError(f"tls_{given}_file is given without tls_{missing}_file; expected both or neither")
        if self.client_ca_file and not self.cert_file:
            raise ValueError("tls_client_ca_file is given without tls_cert_file and tls_key_file; expected all three")

    @property
    def enabled(self) -> bool:
        return bool(self.cert_file)

    def listen(self, server: grpc.aio.Server, host: str, port: int) -> int:
        """Binds, with TLS where there are files; the port that was bound.

        Raises:
            OSError: the address is taken, or a file cannot be read or is no certificate and key.
        """
        address = join(host, port)
        try:
            if not self.enabled:
                return int(server.add_insecure_port(address))
            return int(server.add_secure_port(address, self._credentials()))
        except RuntimeError as exc:
            hint = f", and are {self.cert_file} and {self.key_file} a pair?" if self.enabled else "?"
            raise OSError(f"cannot listen on {address}: is the port taken{hint}") from exc

    def _credentials(self) -> grpc.ServerCredentials:
        pair = (Path(self.key_file).read_bytes(), Path(self.cert_file).read_bytes())
        authority = Path(self.client_ca_file).read_bytes() if self.client_ca_file else None
        return grpc.ssl_server_credentials([pair], authority, require_client_auth=authority is not None)
