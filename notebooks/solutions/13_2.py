"""Keys and values, in each layer, for each head and token."""


def answer(cache_bytes, layers, heads, dim, itemsize, tokens):
    return int(cache_bytes // (2 * layers * heads * dim * itemsize * tokens))
