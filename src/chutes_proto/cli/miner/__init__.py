"""Commands of miners."""
