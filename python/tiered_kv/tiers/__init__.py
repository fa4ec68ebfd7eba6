"""Tiers: the mechanisms that hold KV pages and move them when told (device, host, disk)."""
