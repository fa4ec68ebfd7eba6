"""Who of those running decodes next, and the batch that this makes."""
