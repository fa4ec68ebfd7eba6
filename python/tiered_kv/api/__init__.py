"""What a caller may ask for beside the answer itself: service level, hints, a report."""
