"""The table of what is hooked in SGLang, and the thin functions that are called there."""
