"""Servers that people would pick instead, each a small program after a page of its own documentation."""
