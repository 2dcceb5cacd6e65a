"""Stores that keep rows: SQLite and PostgreSQL."""

MAKE_SPACE = "make space: a server goes on by itself, and a command where it stopped, once you run it again"
"""The advice for a disk that is full."""
