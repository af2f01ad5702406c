"""Weights of pipelines under the names of the models' original code, by hand: the inverse of diffusers' conversion."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_FINAL_LAYER = {"final_layer.linear": ["proj_out"], "final_layer.adaLN_modulation.1": ["norm_out.linear"]}


def stable_diffusion(pipeline: Any) -> dict[str, Tensor]:
    """A pipeline's weights under the names of the original Stable Diffusion code, in one dictionary."""
    text = _prefixed("cond_stage_model.transformer.text_model.", pipeline.text_encoder)
    return {**_unet(pipeline.unet), **_vae(pipeline.vae), **text}


def stable_diffusion_xl(pipeline: Any) -> dict[str, Tensor]:
    """The same for Stable Diffusion XL, whose second text encoder has the names of open_clip."""
    text = _prefixed("conditioner.embedders.0.transformer.text_model.", pipeline.text_encoder)
    return {**_unet(pipeline.unet), **_vae(pipeline.vae), **text, **_open_clip(pipeline.text_encoder_2)}


def flux(pipeline: Any) -> dict[str, Tensor]:
    """A FLUX.1 pipeline's weights under the names of the files that ComfyUI writes and model-sharing sites offer."""
    return {
        **{f"model.diffusion_model.{key}": value for key, value in flux_transformer(pipeline.transformer).items()},
        **_vae(pipeline.vae, "vae."),
        **_prefixed("text_encoders.clip_l.transformer.text_model.", pipeline.text_encoder),
        **_prefixed("text_encoders.t5xxl.transformer.", pipeline.text_encoder_2),
    }


def flux_transformer(transformer: Any) -> dict[str, Tensor]:
    """The transformer's weights under the names of the original FLUX.1 code, as in its authors' files."""
    return _joined(transformer, _flux_layers(transformer.config), swapped=("norm_out.linear",))


def chroma(pipeline: Any) -> dict[str, Tensor]:
    """A Chroma pipeline's weights under the names of files with all networks."""
    return {
        **{f"model.diffusion_model.{key}": value for key, value in chroma_transformer(pipeline.transformer).items()},
        **_vae(pipeline.vae, "vae."),
        **_prefixed("text_encoders.t5xxl.transformer.", pipeline.text_encoder),
    }


def chroma_transformer(transformer: Any) -> dict[str, Tensor]:
    """The transformer's weights under the names of its author's files, of which most are those of FLUX.1."""
    layers, place = _flux_layers(transformer.config), "distilled_guidance_layer."
    layers |= {f"{place}{name}": [f"{place}{name}"] for name in ("in_proj", "out_proj")}
    for i in range(transformer.config.approximator_layers):
        layers[f"{place}layers.{i}.in_layer"] = [f"{place}layers.{i}.linear_1"]
        layers[f"{place}layers.{i}.out_layer"] = [f"{place}layers.{i}.linear_2"]
        layers[f"{place}norms.{i}"] = [f"{place}norms.{i}"]
    return _joined(transformer, layers)


def stable_diffusion_3(pipeline: Any, encoders: Sequence[str] = ("clip_l", "clip_g", "t5xxl")) -> dict[str, Tensor]:
    """The weights of a Stable Diffusion 3 pipeline with some of its text encoders, as in its authors' files.

    They have no projection of the first CLIP, which is the identity.
    """
    transformer = pipeline.transformer
    last = f"transformer_blocks.{transformer.config.num_layers - 1}.norm1_context.linear"
    found = _joined(transformer, _sd3_layers(transformer.config), swapped=("norm_out.linear", last))
    found["pos_embed"] = transformer.state_dict()["pos_embed.pos_embed"]
    text = {
        "clip_l": _prefixed("text_encoders.clip_l.transformer.", pipeline.text_encoder),
        "clip_g": _prefixed("text_encoders.clip_g.transformer.", pipeline.text_encoder_2),
        "t5xxl": _prefixed("text_encoders.t5xxl.transformer.", pipeline.text_encoder_3),
    }
    del text["clip_l"]["text_encoders.clip_l.transformer.text_projection.weight"]
    return {
        **{f"model.diffusion_model.{key}": value for key, value in found.items()},
        **_vae(pipeline.vae),
        **{key: value for name in encoders for key, value in text[name].items()},
    }


def _sd3_layers(config: Any) -> dict[str, list[str]]:
    """Original layers, and the layers of diffusers that they consist of."""
    layers = {
        "x_embedder.proj": ["pos_embed.proj"],
        "context_embedder": ["context_embedder"],
        **_FINAL_LAYER,
    }
    for original, name in {"t_embedder": "timestep", "y_embedder": "text"}.items():
        layers[f"{original}.mlp.0"] = [f"time_text_embed.{name}_embedder.linear_1"]
        layers[f"{original}.mlp.2"] = [f"time_text_embed.{name}_embedder.linear_2"]
    for i in range(config.num_layers):
        block, place = f"transformer_blocks.{i}.", f"joint_blocks.{i}."
        streams = {
            "x_block.attn": ("attn.to_{}", "attn.norm_{}", "attn.to_out.0"),
            "x_block.attn2": ("attn2.to_{}", "attn2.norm_{}", "attn2.to_out.0"),
            "context_block.attn": ("attn.add_{}_proj", "attn.norm_added_{}", "attn.to_add_out"),
        }
        for original, (project, norm, out) in streams.items():
            layers[f"{place}{original}.qkv"] = [f"{block}{project.format(each)}" for each in "qkv"]
            layers[f"{place}{original}.ln_q"] = [f"{block}{norm.format('q')}"]
            layers[f"{place}{original}.ln_k"] = [f"{block}{norm.format('k')}"]
            layers[f"{place}{original}.proj"] = [f"{block}{out}"]
        for stream, (modulation, mlp) in {"x": ("norm1", "ff"), "context": ("norm1_context", "ff_context")}.items():
            layers[f"{place}{stream}_block.adaLN_modulation.1"] = [f"{block}{modulation}.linear"]
            layers[f"{place}{stream}_block.mlp.fc1"] = [f"{block}{mlp}.net.0.proj"]
            layers[f"{place}{stream}_block.mlp.fc2"] = [f"{block}{mlp}.net.2"]
    return layers


def _joined(network: Any, layers: Mapping[str, list[str]], swapped: Sequence[str] = ()) -> dict[str, Tensor]:
    """Join layers' parameters; of those in `swapped` the original has the shift before the scale."""
    state = dict(network.named_parameters())
    found = {}
    for original, parts in layers.items():
        for kind in ("weight", "bias"):
            if f"{parts[0]}.{kind}" not in state:
                continue
            value = torch.cat([state[f"{part}.{kind}"] for part in parts])
            if parts[0] in swapped:
                value = torch.cat(value.chunk(2)[::-1])
            is_scale = original.endswith("_norm") or ".norms." in original
            found[f"{original}.scale" if is_scale else f"{original}.{kind}"] = value
    assert sum(value.numel() for value in found.values()) == sum(value.numel() for value in state.values())
    return found


def _flux_layers(config: Any) -> dict[str, list[str]]:
    """Original layers, and the layers of diffusers that they consist of."""
    layers = {
        "img_in": ["x_embedder"],
        "txt_in": ["context_embedder"],
        **_FINAL_LAYER,
    }
    embedders = {"time_in": "timestep", "vector_in": "text", "guidance_in": "guidance"}
    for original, name in embedders.items():
        layers[f"{original}.in_layer"] = [f"time_text_embed.{name}_embedder.linear_1"]
        layers[f"{original}.out_layer"] = [f"time_text_embed.{name}_embedder.linear_2"]
    for i in range(config.num_layers):
        block = f"transformer_blocks.{i}."
        streams = {
            "img": ("to_{}", "norm_{}", "to_out.0", "ff", "norm1"),
            "txt": ("add_{}_proj", "norm_added_{}", "to_add_out", "ff_context", "norm1_context"),
        }
        for stream, (project, norm, out, ff, modulation) in streams.items():
            place = f"double_blocks.{i}.{stream}_"
            layers[f"{place}attn.qkv"] = [f"{block}attn.{project.format(each)}" for each in "qkv"]
            layers[f"{place}attn.norm.query_norm"] = [f"{block}attn.{norm.format('q')}"]
            layers[f"{place}attn.norm.key_norm"] = [f"{block}attn.{norm.format('k')}"]
            layers[f"{place}attn.proj"] = [f"{block}attn.{out}"]
            layers[f"{place}mlp.0"] = [f"{block}{ff}.net.0.proj"]
            layers[f"{place}mlp.2"] = [f"{block}{ff}.net.2"]
            layers[f"{place}mod.lin"] = [f"{block}{modulation}.linear"]
    for i in range(config.num_single_layers):
        block, place = f"single_transformer_blocks.{i}.", f"single_blocks.{i}."
        layers[f"{place}linear1"] = [*(f"{block}attn.to_{each}" for each in "qkv"), f"{block}proj_mlp"]
        layers[f"{place}linear2"] = [f"{block}proj_out"]
        layers[f"{place}modulation.lin"] = [f"{block}norm.linear"]
        layers[f"{place}norm.query_norm"] = [f"{block}attn.norm_q"]
        layers[f"{place}norm.key_norm"] = [f"{block}attn.norm_k"]
    return layers


def flux_2_transformer(transformer: Any) -> dict[str, Tensor]:
    """The weights of a FLUX.2 transformer under the names of its authors' files."""
    layers = {
        "img_in": ["x_embedder"],
        "txt_in": ["context_embedder"],
        "time_in.in_layer": ["time_guidance_embed.timestep_embedder.linear_1"],
        "time_in.out_layer": ["time_guidance_embed.timestep_embedder.linear_2"],
        **_FINAL_LAYER,
    }
    for name in ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation"):
        layers[f"{name}.lin"] = [f"{name}.linear"]
    for i in range(transformer.config.num_layers):
        block = f"transformer_blocks.{i}."
        streams = {
            "img": ("to_{}", "norm_{}", "to_out.0", "ff"),
            "txt": ("add_{}_proj", "norm_added_{}", "to_add_out", "ff_context"),
        }
        for stream, (project, norm, out, ff) in streams.items():
            place = f"double_blocks.{i}.{stream}_"
            layers[f"{place}attn.qkv"] = [f"{block}attn.{project.format(each)}" for each in "qkv"]
            layers[f"{place}attn.norm.query_norm"] = [f"{block}attn.{norm.format('q')}"]
            layers[f"{place}attn.norm.key_norm"] = [f"{block}attn.{norm.format('k')}"]
            layers[f"{place}attn.proj"] = [f"{block}attn.{out}"]
            layers[f"{place}mlp.0"] = [f"{block}{ff}.linear_in"]
            layers[f"{place}mlp.2"] = [f"{block}{ff}.linear_out"]
    for i in range(transformer.config.num_single_layers):
        block, place = f"single_transformer_blocks.{i}.attn.", f"single_blocks.{i}."
        layers[f"{place}linear1"] = [f"{block}to_qkv_mlp_proj"]
        layers[f"{place}linear2"] = [f"{block}to_out"]
        layers[f"{place}norm.query_norm"] = [f"{block}norm_q"]
        layers[f"{place}norm.key_norm"] = [f"{block}norm_k"]
    return _joined(transformer, layers, swapped=("norm_out.linear",))


def qwen_image_transformer(transformer: Any) -> dict[str, Tensor]:
    """The weights of a Qwen-Image transformer: diffusers has the names of its authors."""
    return dict(transformer.state_dict())


def z_image_transformer(transformer: Any) -> dict[str, Tensor]:
    """The weights of a Z-Image transformer under the names of the files that ComfyUI reads."""
    names = {
        "all_final_layer.2-1.": "final_layer.",
        "all_x_embedder.2-1.": "x_embedder.",
        ".attention.to_out.0.": ".attention.out.",
        ".attention.norm_q.": ".attention.q_norm.",
        ".attention.norm_k.": ".attention.k_norm.",
    }
    found = {}
    for key, value in transformer.state_dict().items():
        original = f"model.diffusion_model.{key}"
        for name, old in names.items():
            original = original.replace(name, old)
        found[original] = value
    for query in [key for key in found if key.endswith(".to_q.weight")]:
        parts = [found.pop(query.replace(".to_q.", f".to_{each}.")) for each in "qkv"]
        found[query.replace(".to_q.", ".qkv.")] = torch.cat(parts)
    return found


def _prefixed(prefix: str, network: Any) -> dict[str, Tensor]:
    return {f"{prefix}{key}": value for key, value in network.state_dict().items()}


def _open_clip(encoder: Any) -> dict[str, Tensor]:
    renames = {
        "text_model.encoder.layers.": "transformer.resblocks.",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_model.embeddings.": "",
        "text_model.final_layer_norm": "ln_final",
        "text_projection.weight": "text_projection",
        "layer_norm1": "ln_1",
        "layer_norm2": "ln_2",
        "fc1": "c_fc",
        "fc2": "c_proj",
        "self_attn.": "attn.",
        "q_proj.": "in_proj_",
    }
    state = encoder.state_dict()
    found = {}
    for key, value in state.items():
        name, joined = key, value
        if ".k_proj." in key or ".v_proj." in key:
            continue
        if ".q_proj." in key:
            joined = torch.cat([state[key.replace("q_proj", f"{each}_proj")] for each in "qkv"])
        if key == "text_projection.weight":
            joined = value.T
        for ours, theirs in renames.items():
            name = name.replace(ours, theirs)
        found[f"conditioner.embedders.1.model.{name}"] = joined
    return found


def _unet(unet: Any) -> dict[str, Tensor]:
    levels, each = len(unet.config.block_out_channels), unet.config.layers_per_block + 1
    places = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
    }
    for i in range(levels):
        places[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{(i + 1) * each}.0.op"
        for j in range(each):
            places[f"down_blocks.{i}.resnets.{j}"] = f"input_blocks.{i * each + j + 1}.0"
            places[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{i * each + j + 1}.1"
            places[f"up_blocks.{i}.resnets.{j}"] = f"output_blocks.{i * each + j}.0"
            places[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{i * each + j}.1"
        attends = hasattr(unet.up_blocks[i], "attentions")
        places[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{(i + 1) * each - 1}.{1 + attends}.conv"
    inside = {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "time_emb_proj": "emb_layers.1",
        "conv_shortcut": "skip_connection",
    }
    found = {}
    for key, value in unet.state_dict().items():
        place = max((p for p in places if key.startswith(f"{p}.")), key=len)
        rest = key.removeprefix(f"{place}.")
        if ".resnets." in place:
            layer = rest.split(".")[0]
            rest = rest.replace(layer, inside[layer])
        found[f"model.diffusion_model.{places[place]}.{rest}"] = value
    return found


def _vae(vae: Any, prefix: str = "first_stage_model.") -> dict[str, Tensor]:
    levels = len(vae.config.block_out_channels)
    renames = {
        **{f"encoder.down_blocks.{i}.resnets.": f"encoder.down.{i}.block." for i in range(levels)},
        **{f"encoder.down_blocks.{i}.downsamplers.0.": f"encoder.down.{i}.downsample." for i in range(levels)},
        **{f"decoder.up_blocks.{i}.resnets.": f"decoder.up.{levels - 1 - i}.block." for i in range(levels)},
        **{f"decoder.up_blocks.{i}.upsamplers.0.": f"decoder.up.{levels - 1 - i}.upsample." for i in range(levels)},
        "mid_block.attentions.0.": "mid.attn_1.",
        "mid_block.resnets.0.": "mid.block_1.",
        "mid_block.resnets.1.": "mid.block_2.",
        "conv_norm_out": "norm_out",
        "conv_shortcut": "nin_shortcut",
        "group_norm": "norm",
        "to_q": "q",
        "to_k": "k",
        "to_v": "v",
        "to_out.0": "proj_out",
    }
    found = {}
    for key, value in vae.state_dict().items():
        name, attention = key, "attentions" in key
        for ours, theirs in renames.items():
            name = name.replace(ours, theirs)
        linear = attention and value.ndim == 2
        found[f"{prefix}{name}"] = value[:, :, None, None] if linear else value
    return found
