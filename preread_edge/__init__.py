"""What the edges of both servers share: who may call, under which id, with which certificates, and what is said of it.

The packages of the two halves cannot import each other, so this lies here. Knows gRPC and ASGI; no model, no store.
"""
