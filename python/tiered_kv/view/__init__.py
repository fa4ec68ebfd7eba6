"""A web page that shows a running server: its prefixes, tiers and requests (docs/view.md)."""
