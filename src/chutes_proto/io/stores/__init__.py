"""Stores that keep rows: SQLite and PostgreSQL."""
