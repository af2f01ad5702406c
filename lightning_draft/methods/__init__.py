"""LightningModules that fine-tune a diffusion model on a reward: direct gradients and policy gradients."""
