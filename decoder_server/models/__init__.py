"""The contract of a backend, and the two kinds: fbnl reads states, cross_encoder reads text."""
