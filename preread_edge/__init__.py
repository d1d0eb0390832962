"""The edge of both servers, which cannot import each other. Knows gRPC and ASGI; no model, no store."""
