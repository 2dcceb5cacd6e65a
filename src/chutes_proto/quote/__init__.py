"""The quote verifier, usable alone: it knows nothing of the rest of the project. Start at ``quote/_verify.py``."""
