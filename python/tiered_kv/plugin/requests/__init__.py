"""What callers ask for and are told, on each of SGLang's routes."""
