"""What a setting or a fleet will do, from the real scheduler on a virtual clock."""
