"""What the tests of cascade attention share."""
