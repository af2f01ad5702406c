"""LightningModules that fine-tune a diffusion model on a reward, one for each kind of method."""
