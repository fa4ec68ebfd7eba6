"""A bounded picture of a running server: what the scheduler's thread notes, and what it means."""
