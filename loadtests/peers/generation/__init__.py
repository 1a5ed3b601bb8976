"""Text generation beside other servers: the same weights, prompts and core."""
