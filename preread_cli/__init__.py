"""The `preread` command. Nothing imports this package; it imports everything else, and only when a command needs it."""
