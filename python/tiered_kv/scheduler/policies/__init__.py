"""Request orders of other systems, as baselines: one file each, with its source."""
