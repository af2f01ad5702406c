"""Fine-tune text-to-image diffusion models on a reward by back-propagating through the sampler."""

__version__ = "0.1.0"
