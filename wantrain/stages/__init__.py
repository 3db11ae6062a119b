"""One file a verb, readable from top to bottom; none imports another."""
