"""Fault injection: damage, kills, odd checkpoints, hostile Unicode. The tests run each part with small counts."""
