"""Everything that knows Wan. diffusers and transformers are imported in this room only."""
