"""What the server reports about itself: the names, in one table."""
