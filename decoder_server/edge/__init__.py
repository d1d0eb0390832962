"""The protocols of the reranking server: gRPC, TEI over gRPC, HTTP."""
