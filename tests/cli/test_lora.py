"""The command `lora` and the scale sweep of `sample`."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import lightning_draft
from lightning_draft.__main__ import main
from lightning_draft.errors import ConfigurationError
from lightning_draft.image_generation import generate
from lightning_draft.models import Guidance, LoRA, StableDiffusion
from lightning_draft.models.lora_content import LoRAFile
from lightning_draft.rewards import Samples
from lightning_draft.samplers import DDIM
from lightning_draft.scale_sweep import save_plot, sweep

WEIGHTS = "diffusion_pytorch_model.safetensors"
LAYERS = {"a": ["to_q", "conv1"], "b": ["to_q", "to_v"]}


@pytest.fixture
def files(tiny_sd: Path, tmp_path: Path) -> dict[str, Path]:
    """Two LoRA files that share some layers."""
    for seed, (name, layers) in enumerate(LAYERS.items()):
        model = StableDiffusion(str(tiny_sd), lora=LoRA(2 + seed, alpha=3.0, target_modules=layers))
        generator = torch.Generator().manual_seed(seed)
        for _, value in model.trainable_parameters():
            value.data = 0.2 * torch.randn(value.shape, generator=generator)
        model.save_lora(tmp_path / f"{name}.safetensors", {"base": str(tiny_sd), "reward": "Brightness()"})
    return {name: tmp_path / f"{name}.safetensors" for name in LAYERS}


def run(*args: object) -> int:
    return main(["lora", *map(str, args)])


def read(folder: Path, file: Path) -> LoRAFile:
    return StableDiffusion(str(folder), lora=None).read_lora(file)


def dense(file: LoRAFile) -> dict[str, Tensor]:
    return {layer: update.dense() for layer, update in file.denoiser.items()}


def test_mix_is_the_weighted_sum_of_dense_updates(tiny_sd: Path, files: Any, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "c.safetensors"
    assert run("mix", f"{files['a']}:0.7", f"{files['b']}:-0.5", "-o", out) == 0
    assert "rank 5, relative error of dW 0" in capsys.readouterr().out
    a, b, mixed = (dense(read(tiny_sd, file)) for file in (files["a"], files["b"], out))
    assert mixed.keys() == a.keys() | b.keys()
    for layer, update in mixed.items():
        zero = torch.zeros_like(update)
        torch.testing.assert_close(update, 0.7 * a.get(layer, zero) - 0.5 * b.get(layer, zero), rtol=1e-4, atol=1e-6)
    with safe_open(out, "pt") as content:
        assert json.loads(content.metadata()["mix"]) == [["a.safetensors", 0.7], ["b.safetensors", -0.5]]


def test_mix_at_a_rank_states_its_relative_error(tiny_sd: Path, files: Any, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "c.safetensors"
    assert run("mix", files["a"], files["b"], "-o", out, "--rank", 2) == 0
    stated = float(capsys.readouterr().out.partition("error of dW ")[2].split()[0])
    a, b, mixed = (dense(read(tiny_sd, file)) for file in (files["a"], files["b"], out))
    wanted = {layer: a.get(layer, 0) + b.get(layer, 0) for layer in mixed}
    error = sum(float((mixed[layer] - wanted[layer]).square().sum()) for layer in mixed)
    total = sum(float(update.square().sum()) for update in wanted.values())
    assert stated == pytest.approx((error / total) ** 0.5, rel=1e-2)
    assert stated > 0.01


def test_convert_and_scale_keep_and_multiply_the_update(tiny_sd: Path, files: Any, tmp_path: Path) -> None:
    comfy, weaker = tmp_path / "a.comfy.safetensors", tmp_path / "weaker.safetensors"
    assert run("convert", files["a"], "-o", comfy, "--format", "comfy") == 0
    assert run("scale", comfy, 0.25, "-o", weaker, "--dtype", "float16", "--model", tiny_sd) == 0
    assert {key.partition("_")[0] for key in load_file(comfy)} == {"lora"}
    assert {value.dtype for value in load_file(weaker).values()} == {torch.float16}
    a, same, quarter = (dense(read(tiny_sd, file)) for file in (files["a"], comfy, weaker))
    for layer, update in a.items():
        torch.testing.assert_close(same[layer], update, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(quarter[layer].float(), 0.25 * update, rtol=2e-2, atol=2e-3)


def test_merged_pipeline_gives_the_images_of_the_lora(tiny_sd: Path, files: Any, tmp_path: Path) -> None:
    assert run("merge", files["a"], "-o", tmp_path / "merged", "--scale", 0.5) == 0
    model = StableDiffusion(str(tiny_sd), lora=None, guidance=Guidance(2.0))
    model.load_lora(files["a"])
    ours = generate(model, DDIM(2), ["a red cat"], seed=3, scale=0.5).images.clamp(0, 1)
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "merged")
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    latents = model.noise(1, torch.Generator().manual_seed(3))
    options = {"num_inference_steps": 2, "guidance_scale": 2.0, "latents": latents, "output_type": "pt"}
    torch.testing.assert_close(pipeline(["a red cat"], **options).images, ours, rtol=0, atol=2e-4)


def test_info_lists_metadata_and_the_largest_updates(tiny_sd: Path, files: Any, capsys: Any) -> None:
    assert run("info", files["b"]) == 0
    lines = capsys.readouterr().out.splitlines()
    norms = {f"unet.{layer}": float(update.norm()) for layer, update in dense(read(tiny_sd, files["b"])).items()}
    total = sum(value**2 for value in norms.values()) ** 0.5
    assert "reward: Brightness()" in lines
    assert any(line.startswith(f"{len(norms)} layers, ranks [3], |dW| = {total:.3f}"[:-1]) for line in lines)
    first = next(line for line in lines if "unet." in line).split()
    assert first[1:] == ["3", "3", max(norms, key=lambda name: norms[name])]
    assert float(first[0]) == pytest.approx(max(norms.values()), rel=1e-4)


def scored(capsys: Any, *args: object) -> dict[str, float]:
    """Run a command with a prompt and a reward, and return the printed means by label."""
    assert run(*args, "--prompt", "a cat", "--reward", "Brightness", "--steps", 2) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if " Brightness " in line]
    return {line.rpartition(" Brightness ")[0].strip(): float(line.split()[-1]) for line in lines}


def test_grids_show_the_base_the_inputs_and_the_result_from_the_same_noise(
    tiny_sd: Path, files: Any, tmp_path: Path, capsys: Any
) -> None:
    """A mix with weight 0 for one file is the other file, and a merge at a scale is the file at this scale."""
    out, folder, halved = tmp_path / "c.safetensors", tmp_path / "merged", tmp_path / "half.safetensors"
    base = ["--model", tiny_sd]
    mixed = scored(capsys, "mix", f"{files['a']}:0", f"{files['b']}:1", "-o", out, "--grid", tmp_path / "mix.webp")
    assert list(mixed) == ["base", "a.safetensors", "b.safetensors", "c.safetensors (new)"]
    assert mixed["c.safetensors (new)"] == pytest.approx(mixed["b.safetensors"], abs=5e-6)
    assert len({f"{value:.3g}" for value in mixed.values()}) == 3
    merged = scored(capsys, "merge", files["b"], "-o", folder, "--scale", 0.5)
    half = scored(capsys, "scale", files["b"], 0.5, "-o", halved, *base)
    assert merged["merged (merged)"] == pytest.approx(merged["b.safetensors"], abs=5e-6)
    assert merged["merged (merged)"] == pytest.approx(half["half.safetensors (new)"], abs=5e-6)
    assert half["b.safetensors"] == mixed["b.safetensors"]
    assert half["base"] == mixed["base"] == merged["base"]
    for grid in ("mix.webp", "merged.png", "half.png"):
        with Image.open(tmp_path / grid) as image:
            assert image.width > 300


def test_annealed_file_names_its_schedule_and_is_sampled_with_it(
    files: Any, tiny_sd: Path, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "c.safetensors"
    means = scored(capsys, "anneal", files["a"], "--schedule", "0,0", "-o", out)
    assert means["c.safetensors (new)"] == pytest.approx(means["base"], abs=5e-6)
    assert abs(means["a.safetensors"] - means["base"]) > 5e-5
    with safe_open(out, "pt") as content:
        assert json.loads(content.metadata()["scale_schedule"])["scales"] == [0.0, 0.0]
    args = ["--model", str(tiny_sd), "--prompt", "a cat", "--reward", "Brightness", "--steps", "2"]
    assert main(["sample", str(out), *args, "--schedule", "1", "--output", str(tmp_path / "s.png")]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if " Brightness " in line]
    assert float(lines[0][-1]) == pytest.approx(means["base"], abs=5e-6)
    assert float(lines[1][-1]) == pytest.approx(means["a.safetensors"], abs=5e-6)


def test_headers_have_no_local_folder_and_the_config_of_the_run_locates_the_base(
    tiny_sd: Path, files: Any, tmp_path: Path, capsys: Any
) -> None:
    run_folder = tmp_path / "run"
    out, moved = run_folder / "lora" / "best.safetensors", tmp_path / "moved.safetensors"
    assert run("scale", files["a"], 1.0, "-o", out) == 0
    assert run("merge", files["a"], "-o", tmp_path / "merged") == 0
    with safe_open(out, "pt") as content:
        assert content.metadata()["base"] == tiny_sd.name
    assert str(tiny_sd) not in (tmp_path / "merged" / "training.json").read_text()
    assert run("info", out) == 2
    assert f"was trained on {tiny_sd.name}, which is not here: headers do not contain" in capsys.readouterr().err
    model = {"class_path": "StableDiffusion", "init_args": {"pretrained": str(tiny_sd)}}
    config = {"model": {"class_path": "DraftModule", "init_args": {"model": model}}}
    (run_folder / "config.yaml").write_text(yaml.safe_dump(config))
    assert run("info", out) == 0
    moved.write_bytes(out.read_bytes())
    assert run("info", moved) == 2
    assert run("info", moved, "--model", tiny_sd) == 0


def test_public_functions_edit_files(tiny_sd: Path, files: Any, tmp_path: Path) -> None:
    """Read, scale, resize, mix, anneal, write, convert and merge, without the weights of the base model."""
    a, b = (lightning_draft.read_lora(file) for file in files.values())
    assert {info.rank for info in lightning_draft.lora_info(a)} == {2}
    mixed, error = lightning_draft.mix_loras([lightning_draft.scale_lora(a, 2.0), b], [0.5, -1.0])
    assert error < 1e-6
    small, lost = lightning_draft.resize_lora(mixed, 1)
    assert (small.rank, 0 < lost < 1) == (1, True)
    schedule = lightning_draft.ScaleSchedule(power=2.0)
    lightning_draft.write_lora(lightning_draft.anneal_lora(mixed, schedule), tmp_path / "c.safetensors")
    assert (
        lightning_draft.convert_lora(tmp_path / "c.safetensors", tmp_path / "d.safetensors", "comfy", base=str(tiny_sd))
        == 0.0
    )
    again = lightning_draft.read_lora(tmp_path / "d.safetensors", str(tiny_sd))
    assert lightning_draft.ScaleSchedule.from_text(again.metadata["scale_schedule"]) == schedule
    ours, inputs = dense(again), (dense(a), dense(b))
    for layer, update in ours.items():
        zero = torch.zeros_like(update)
        expected = inputs[0].get(layer, zero) - inputs[1].get(layer, zero)
        torch.testing.assert_close(update, expected, rtol=1e-4, atol=1e-5)
    constant = lightning_draft.anneal_lora(again, lightning_draft.ScaleSchedule(power=0.0))
    lightning_draft.merge_lora(constant, tmp_path / "merged", scale=0.5)
    before, after = (load_file(folder / "unet" / WEIGHTS) for folder in (tiny_sd, tmp_path / "merged"))
    for layer, update in ours.items():
        moved = after[f"{layer}.weight"] - before[f"{layer}.weight"]
        torch.testing.assert_close(moved, 0.5 * update, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["mix"], "the following arguments are required"),
        (["info", "none.safetensors"], "there is no LoRA file none.safetensors"),
        (["scale", "a.safetensors", "much", "-o", "b.safetensors"], "invalid float value: 'much'"),
        (["merge", "{a}", "-o", "{folder}"], "is not a pipeline, and its content would be lost"),
        (["merge", "{a}", "-o", "{folder}/new", "--scale", "nan"], "scale=nan must be a finite number"),
        (["merge", "{wide}", "-o", "{folder}/new"], "1 of its 1 layers have other shapes in this model"),
        (["mix", "{a}", "-o", "{folder}/new.safetensors", "--rank", "0"], "rank=0"),
        (["convert", "{a}", "-o", "{folder}/new.safetensors", "--reward", "Brightness"], "a scored grid needs prompts"),
        (
            ["convert", "{a}", "-o", "{folder}/new.safetensors", "--prompt", "a cat", "--reward", "Brightnes"],
            "did you mean Brightness",
        ),
        (["scale", "{a}", "1e300", "-o", "{folder}/new.safetensors"], "is not finite in float32"),
        (
            ["scale", "{a}", "1e9", "-o", "{folder}/new.safetensors", "--format", "comfy", "--dtype", "float16"],
            "is not finite in float16, whose largest number is 65504",
        ),
        (["anneal", "{a}", "-o", "{folder}/new.safetensors", "--schedule", "sine"], "'sine' is not a scale schedule"),
    ],
)
def test_invalid_arguments_are_rejected(
    args: list[str], message: str, files: Any, tiny_sd: Path, tmp_path: Path, capsys: Any
) -> None:
    wide = tmp_path / "wide.safetensors"
    layer = next(name for name in load_file(files["a"]) if name.endswith("lora_A.weight")).removesuffix("A.weight")
    factors = {f"{layer}A.weight": torch.ones(1, 99), f"{layer}B.weight": torch.ones(98, 1)}
    save_file(factors, wide, metadata={"base": str(tiny_sd)})
    before = sorted(tmp_path.iterdir())
    assert run(*(text.format(**files, wide=wide, folder=tmp_path) for text in args)) == 2
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_the_suggested_scale_has_the_best_evaluation_reward(tiny_sd: Path, files: Any, tmp_path: Path) -> None:
    """An evaluation reward that falls with the scale chooses 0 although the trained reward rises."""
    model = StableDiffusion(str(tiny_sd), lora=None, guidance=Guidance(1.0))
    model.load_lora(files["a"])
    base = generate(model, DDIM(2), ["a", "b"], 0, 0.0).images

    def score(samples: Samples, prompts: Any) -> dict[str, Tensor]:
        assert samples.images is not None
        moved = (samples.images - base.clamp(0, 1)).square().mean((1, 2, 3))
        return {"reward": moved, "judge": -moved}

    found = sweep(model, DDIM(2), ["a", "b"], [0.0, 0.5, 1.0], score, evaluation=["judge"])
    assert found.best_scale() == (0.0, "judge")
    assert found.mean("reward", 1.0) > found.mean("reward", 0.5) > 0 == found.mean("reward", 0.0)
    save_plot(found, tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as plot:
        assert plot.size == (768, 528)


def test_sample_sweeps_scales_with_rewards_of_the_command_line(files: Any, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "grid.png"
    args = [
        "--scale",
        "0,0.5",
        "1",
        "--prompt",
        "a cat",
        "--reward",
        "Brightness",
        "--steps",
        "2",
        "--output",
        str(out),
    ]
    assert main(["sample", str(files["a"]), *args]) == 0
    printed = capsys.readouterr().out
    means = {line.split()[-3]: float(line.split()[-1]) for line in printed.splitlines() if " Brightness " in line}
    assert (tmp_path / "grid_scales.png").is_file()
    best = printed.rpartition("best scale by Brightness: ")[2].strip().partition(",")[0]
    assert max(means, key=lambda scale: means[scale]) == {"0": "base"}.get(best, best)


def test_the_rank_is_at_most_the_smaller_side_of_the_largest_layer(files: Any, tmp_path: Path, capsys: Any) -> None:
    assert run("convert", files["a"], "-o", tmp_path / "c.safetensors", "--rank", 10**9) == 2
    assert "write at most" in capsys.readouterr().err
    assert not (tmp_path / "c.safetensors").exists()


def test_information_escapes_control_characters_of_the_header(files: Any, tmp_path: Path, capsys: Any) -> None:
    with safe_open(files["a"], "pt") as content:
        header = content.metadata()
    save_file(load_file(files["a"]), tmp_path / "red.safetensors", {**header, "note": "\x1b[31mred"})
    assert run("info", tmp_path / "red.safetensors") == 0
    assert "note: \\x1b[31mred" in capsys.readouterr().out


def test_images_that_are_not_finite_are_an_error(tiny_sd: Path, files: Any) -> None:
    model = StableDiffusion(str(tiny_sd), lora=LoRA(2, target_modules=LAYERS["a"]))
    model.load_lora(files["a"])
    with pytest.raises(ConfigurationError, match=r"scale=3e\+38 gives images .* not finite"):
        generate(model, DDIM(1), ["a cat"], 0, scale=3e38)


def test_interpolation_needs_a_schedule(capsys: Any) -> None:
    assert main(["sample", "x.safetensors", "--prompt", "a", "--interpolate", "predictions"]) == 2
    assert "--interpolate predictions needs a schedule; write --schedule linear" in capsys.readouterr().err
