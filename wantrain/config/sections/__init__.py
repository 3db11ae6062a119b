"""The sections of a config: each with its fields, its rules, and what of it a resume may change."""
