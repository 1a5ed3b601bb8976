"""Memory allows 4 (5.6 GB), cores allow 4."""

answer = min(int(6 / 1.4), 4)
