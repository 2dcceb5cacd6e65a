"""The synchronous edge: files, SQLite, programs, and a driver without an event loop. Nothing pure imports this room."""
