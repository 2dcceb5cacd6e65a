"""Rows, row operations and their SQL; units, and how they are run."""
