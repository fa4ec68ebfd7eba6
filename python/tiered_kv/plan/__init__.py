"""Capacity planning: what fits in which tier, what a hit saves, what long context costs."""
