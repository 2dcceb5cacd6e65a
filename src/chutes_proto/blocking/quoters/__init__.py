"""Where quotes come from on a real machine, one quoter a file. `chutes_proto.blocking.quoting` chooses among them."""
