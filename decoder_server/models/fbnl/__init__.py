"""What a model computed of a passage before and keeps: per-layer keys and values, and prompt beginnings on top."""
