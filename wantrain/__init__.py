"""wantrain: LoRA fine-tuning for the Wan video diffusion models."""

__version__ = "0.1.0"
