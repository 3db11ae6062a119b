"""Many trainings over one cache, compared: what `wantrain tune` and benchmarks/recipes.py are made of."""
