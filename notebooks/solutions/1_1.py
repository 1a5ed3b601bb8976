"""100 calls of 20 ms fit into 2 s; the first of them is the one that has just begun."""

answer = 2000 // 20 - 1
