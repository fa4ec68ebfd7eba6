"""Who of those waiting is admitted next."""
