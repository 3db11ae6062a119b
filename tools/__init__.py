"""What only maintainers run: the tiny world, its base and demo, and cuts of the footage for tests."""
