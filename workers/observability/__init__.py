"""Request log, traces, what the process takes of its machine."""
