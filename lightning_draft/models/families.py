"""All model families of the package; a new one is added here with one line."""

from lightning_draft.models.stable_diffusion import StableDiffusion as StableDiffusion
from lightning_draft.models.stable_diffusion_3 import StableDiffusion3 as StableDiffusion3
from lightning_draft.models.stable_diffusion_xl import StableDiffusionXL as StableDiffusionXL
