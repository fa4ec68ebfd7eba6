"""A store that a cluster shares, as a cold store: what one server computed, another reads.

`object_store` is the store as the tiers see it, `envelope` what goes around each page, `link` when
the store is left alone; `blobs` is what an engine's client has to do, `valkey` and `mooncake` are
such clients, and `address` says what `--tiered-kv-store` may name.
"""
