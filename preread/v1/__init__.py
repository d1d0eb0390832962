"""Generated gRPC stubs of proto/preread/v1; run scripts/generate-stubs to make them again."""
