"""What several verbs open: a config with its base, its clips, its samples, its sampler."""
