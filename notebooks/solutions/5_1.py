"""Patience times speed."""

answer = 40 * 1.5
