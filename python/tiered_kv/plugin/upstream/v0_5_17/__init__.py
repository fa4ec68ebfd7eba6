"""Every symbol of SGLang 0.5.17 that is used."""
