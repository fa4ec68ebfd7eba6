"""Words, units, errors, clocks and configuration that every other package shares."""
