"""Manifest, decode, cache, batches: from files to what a step trains on."""
