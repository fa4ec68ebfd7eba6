"""The disk tier: pages of KV, keyed by content, in segment files that survive restarts.

Public names live in `tiered_kv.tiers.disk.store` (DiskStore), `.namespace` (DiskNamespace) and
`.stats` (DiskStats).  The package imports neither torch nor sglang: buffers are memoryviews.

What is guaranteed
- A page is acknowledged (counted by `write_pages`, seen by `contains`) after its bytes and then
  its index row were handed to the kernel. Killing the process at any instant loses no such page.
- After a power loss a page may be gone or torn; a torn or stale one fails its checksum and is a
  miss. With `sync_writes=True` data and index are on the device before a page is acknowledged.
- Everything under the directory stays within `capacity_bytes`, at every instant. Old pages make
  room for new ones: "acknowledged" does not mean "kept for ever".
- Operating errors (disk full, I/O errors) never raise out of reads and writes: a read is a miss,
  writes pause for a while and come back by themselves.
- A disk that hangs makes nobody wait who had not begun to: reads are misses, writes are refused;
  who waits for a write leaves.
- `DiskTier` opens whatever state the disk is in, and mends itself; only misuse raises.

How it is built, from the bottom up: `io_ops` (system calls), `record` (bytes on disk),
`encryption`, `index` (SQLite), `segment` and `catalog` (what is where, in memory), `budget` and
`space` (which bytes may be used, and which pages go), `io_path` and `memory_pressure` (past the
page cache or through it), `record_layout` and `page_io` (scatter/gather of pages), `stall_watch`,
`write_gate`, `reader`, `writer`, `store`; `faults` says what an error is to be blamed on,
`lost_files` finds what somebody else deleted. Above a store: `shards` (the directory that a server
is given) and `tier` (whatever state it is in). The whole story is in `docs/disk_tier.md`.
"""
