"""Support for tests of the request-level scheduler."""
