"""A key server in a process: files, sockets, log."""
