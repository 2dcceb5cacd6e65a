"""Rows, row operations, their SQL, and the memory store."""
