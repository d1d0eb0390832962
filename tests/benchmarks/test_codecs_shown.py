"""What is best for its bytes, against the plain definition."""

import numpy as np

from benchmarks.codecs_shown import COMPUTE, best_for_bytes


def test_every_row_left_out_is_no_nearer_than_a_smaller_one():
    rng = np.random.default_rng(0)
    names = [*map(str, range(50)), COMPUTE]
    rows = {
        (name, 1): {"codec": name, "bytes a token": int(size), "tau to r = 1": float(tau)}
        for name, size, tau in zip(names, rng.integers(1, 20, 51), rng.random(51), strict=True)
    }
    best = best_for_bytes(rows)
    pairs = [(row["bytes a token"], row["tau to r = 1"]) for row in best]
    assert COMPUTE not in [row["codec"] for row in best]
    assert pairs == sorted(pairs)
    for (codec, _), row in rows.items():
        near_as = [tau for size, tau in pairs if size <= row["bytes a token"]]
        assert codec == COMPUTE or row in best or max(near_as) >= row["tau to r = 1"] - 0.01
