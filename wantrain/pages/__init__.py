"""HTML pages, each one file with everything inside, that open from disk without a network."""
