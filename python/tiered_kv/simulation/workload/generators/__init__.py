"""Made-up work of a stated shape, the same for the same seed."""
