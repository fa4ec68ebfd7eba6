"""What tests of placement share."""
