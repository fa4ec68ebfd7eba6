"""What the forest's property tests are made of."""
