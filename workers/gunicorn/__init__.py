"""How Gunicorn runs the app: one config per mode, and what they share."""
