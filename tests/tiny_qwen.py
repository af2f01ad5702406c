"""Small random pipelines with text encoders of the Qwen family, written in the format of real ones."""

from pathlib import Path

from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3Model,
)

from tests.tiny_autoencoders import flux_autoencoder
from tests.tiny_pipelines import perturb

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
        text_encoder=perturb(Qwen3Model(text)),
        tokenizer=words,
        transformer=perturb(transformer),
    ).save_pretrained(folder)


def _vision_language_model(vocab_size: int) -> Qwen2_5_VLForConditionalGeneration:
    text = {
        "vocab_size": vocab_size,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "bos_token_id": None,
        "eos_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    special = {"image_token_id": 0, "video_token_id": 1, "vision_start_token_id": 2, "vision_end_token_id": 3}
    config = Qwen2_5_VLConfig(text_config=text, vision_config={**vision, "fullatt_block_indexes": [0]}, **special)
    return Qwen2_5_VLForConditionalGeneration(config)


def qwen_image(folder: Path) -> None:
    """Qwen-Image, with the published schedule: dynamic shifts, and a last time of 0.02."""
    words = tokenizer()
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 6, 6),
    )
    vae = AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[True],
        latents_mean=[-0.7, 0.2, 0.4, -0.1],
        latents_std=[2.8, 1.4, 2.3, 1.1],
    )
    shift = {"use_dynamic_shifting": True, "max_shift": 0.9, "max_image_seq_len": 8192, "shift_terminal": 0.02}
    QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**shift),
        vae=perturb(vae),
        text_encoder=perturb(_vision_language_model(len(words))),
        tokenizer=words,
        transformer=perturb(transformer),
    ).save_pretrained(folder)
