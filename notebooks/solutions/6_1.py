"""Memory allows 3 (4.2 GB), cores allow 4."""

answer = min(int(5 / 1.4), 4)
