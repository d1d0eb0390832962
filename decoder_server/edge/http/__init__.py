"""The HTTP gateway: other rerankers' dialects, and collections, on the engines that also answer gRPC."""
