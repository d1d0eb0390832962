"""A relay in front of a gRPC server, which keeps the messages that clients send through it."""

from __future__ import annotations

import socket
import threading
from collections import defaultdict

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
FRAME_HEADER_BYTES, DATA, PADDED = 9, 0, 0x08  # RFC 9113, 4.1 and 6.1
MESSAGE_HEADER_BYTES = 5  # gRPC: one byte says whether it is compressed, four are the length


class Relay:
    """Listens at `address`; every connection goes on to `upstream`, and what its client sends is kept."""

    def __init__(self, upstream: str) -> None:
        host, _, port = upstream.rpartition(":")
        self._upstream = (host, int(port))
        self._sent: list[bytearray] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def messages(self) -> list[bytes]:
        """Of every call so far, in order of connection and stream; a stream's last message if it has several."""
        return [message for sent in self._sent for message in _messages(bytes(sent))]

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(self._upstream)
            self._sent.append(bytearray())
            for source, target, kept in ((client, server, self._sent[-1]), (server, client, None)):
                threading.Thread(target=_pump, args=(source, target, kept), daemon=True).start()


def _pump(source: socket.socket, target: socket.socket, kept: bytearray | None) -> None:
    try:
        while data := source.recv(65536):
            if kept is not None:
                kept += data
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        pass  # one of the two has gone


def _messages(sent: bytes) -> list[bytes]:
    """Payloads of DATA frames, joined by stream, without gRPC's five bytes."""
    assert sent.startswith(PREFACE)
    streams: dict[int, bytes] = defaultdict(bytes)
    begin = len(PREFACE)
    while begin + FRAME_HEADER_BYTES <= len(sent):
        num_bytes = int.from_bytes(sent[begin : begin + 3], "big")
        kind, flags = sent[begin + 3], sent[begin + 4]
        stream = int.from_bytes(sent[begin + 5 : begin + 9], "big")
        begin += FRAME_HEADER_BYTES
        if kind == DATA and num_bytes:
            assert not flags & PADDED
            streams[stream] += sent[begin : begin + num_bytes]
        begin += num_bytes
    return [streams[stream][MESSAGE_HEADER_BYTES:] for stream in sorted(streams)]
