"""The quote verifier, usable alone: of the project it imports `_converter` only. Start at ``quote/_verify.py``."""
