"""`preread tune`: how much quality each stored ratio, codec and read ratio, or cascade of them, loses, and its cost.

    configurations -> margins of every (stored ratio, codec, read ratio) -> orders -> quality and costs -> choice

States are encoded once per passage, kept on disk, and pooled and coded again for each.
"""
