"""Which collateral is at hand for a platform."""
