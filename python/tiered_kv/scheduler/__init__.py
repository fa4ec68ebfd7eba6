"""Who runs next, and what it costs: predictions and plans as values, carried out elsewhere."""
