"""The outside world, by subject: the only package that opens files, sockets and databases. Nothing pure imports it."""
