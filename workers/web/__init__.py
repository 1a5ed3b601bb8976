"""From bytes to inputs and back: limits, access, parsing, errors, streaming, clients that leave."""
