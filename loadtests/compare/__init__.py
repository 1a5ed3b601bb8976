"""Every deployment mode through the same scenarios."""
