"""Parts of both servers' edges: keys, TLS, hosts, listeners, calls and their log lines, settings.

The packages of the two halves cannot import each other, so this lies here. Knows gRPC and ASGI; no model, no store.
"""
