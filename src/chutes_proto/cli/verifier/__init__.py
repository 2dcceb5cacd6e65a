"""Commands of those who verify quotes."""
