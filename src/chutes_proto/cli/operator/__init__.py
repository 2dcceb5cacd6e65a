"""Commands of those who operate a key server."""
