"""Moved to `workers.web.http_protocol`; this name goes with the next release."""

from workers.web.http_protocol import Protocol as Protocol
