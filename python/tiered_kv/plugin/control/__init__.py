"""Orders of administrators about the KV of a prompt: taken over HTTP, carried out in schedulers."""
