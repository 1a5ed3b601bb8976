"""One PyTorch model behind HTTP: what the server is made of. DESIGN: each file's docstring says what it is for."""

__version__ = "1.0.0"
