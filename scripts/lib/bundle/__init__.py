"""Builds what an air-gapped host needs to serve with --tiered-kv: `scripts/offline_bundle`.

Standard library only, so that any Python from 3.11 with pip can build a bundle.
"""
