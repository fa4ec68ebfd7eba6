"""Forward passes as they were launched, and how long they took."""
