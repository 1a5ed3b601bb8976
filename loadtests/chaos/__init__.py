"""Fault injection: the real server under random load while everything around it fails."""
