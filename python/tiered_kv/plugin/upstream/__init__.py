"""What is used of SGLang, release by release, and the platform for CPUs."""
