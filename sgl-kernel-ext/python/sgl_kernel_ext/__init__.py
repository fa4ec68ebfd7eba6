"""KV pages between a device pool and page-first buffers, with or without a change of format."""
