"""A procedural world and the trainers that made the embedded tiny base from it."""
