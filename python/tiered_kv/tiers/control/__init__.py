"""What administrators do to single prompts: look, bring nearer, keep, move down, forget."""
