"""What qaware costs and what it gains, measured; run by hand, asserted by no test."""
