"""`preread tune`: which stored ratio, codec and read ratio, or cascade of them, loses how much and costs what.

    configurations -> margins of every (stored ratio, codec, read ratio) -> orders -> quality, beside costs -> choice

States are encoded once per passage, kept on disk, and pooled and coded anew for each. Nothing here serves.
"""
