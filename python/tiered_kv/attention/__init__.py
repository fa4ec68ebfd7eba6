"""Cascade attention: KV that several decoding requests share is read once for all of them."""
