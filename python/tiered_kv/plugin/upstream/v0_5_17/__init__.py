"""What is specific to SGLang 0.5.17."""
