"""A process for the model, which may crash or hang; and what to do with inputs that crash it."""
