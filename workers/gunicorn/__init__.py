"""How Gunicorn runs the app: one config a mode, and what they share."""
