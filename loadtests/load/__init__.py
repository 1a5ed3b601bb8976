"""Load generators: Locust in its process, raw connections, request forms, rows."""
