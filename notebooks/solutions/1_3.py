"""A name that a function assigns is local everywhere in it."""

answer = "UnboundLocalError"
