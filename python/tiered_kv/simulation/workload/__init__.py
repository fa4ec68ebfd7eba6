"""What is asked of a server, and when: recorded traces and generators."""
