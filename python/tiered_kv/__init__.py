"""Tiered KV cache for SGLang: prefixes live on the device, in host memory and on disk."""
