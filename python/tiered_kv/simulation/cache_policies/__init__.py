"""Eviction that knows more than a server can: the limit, and what a workflow could tell."""
