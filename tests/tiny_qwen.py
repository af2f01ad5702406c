"""Small random pipelines with text encoders of the Qwen family, written in the format of real ones."""

from pathlib import Path

from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model

from tests.conftest import _perturb
from tests.tiny_autoencoders import flux_autoencoder

CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer() -> Qwen2Tokenizer:
    """Byte-pair encoding of single bytes and one word, with the tokens and the template of chats."""
    merges = [("c", "a"), ("ca", "t")]
    pieces = [*sorted(ByteLevel.alphabet()), *map("".join, merges)]
    tokens = [*pieces, "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    words = Qwen2Tokenizer({token: number for number, token in enumerate(tokens)}, merges, model_max_length=1024)
    words.add_special_tokens({"additional_special_tokens": tokens[-2:]})
    words.chat_template = CHAT
    return words


def z_image(folder: Path) -> None:
    """Z-Image, without dynamic shifts like the published models."""
    words = tokenizer()
    text = Qwen3Config(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 6, 6],
        axes_lens=[128, 32, 32],
    )
    ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=flux_autoencoder(),
        text_encoder=_perturb(Qwen3Model(text)),
        tokenizer=words,
        transformer=_perturb(transformer),
    ).save_pretrained(folder)
