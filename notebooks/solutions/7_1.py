"""Tokens, numbers a token, bytes a number."""

answer = 200 * 768 * 12 / 1e6
