"""`preread tune`: how much quality each stored ratio, codec and read ratio, or cascade of them, loses, and its cost."""
