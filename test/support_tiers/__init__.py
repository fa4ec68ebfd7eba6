"""What the tests of the tiers share: a pretend engine, and random histories of its work."""
