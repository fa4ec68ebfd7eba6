"""Which prefix lives in which tier: decisions as frozen values, carried out elsewhere."""
