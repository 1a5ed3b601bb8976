def write(out): (out/"peers.md").write_text("")
