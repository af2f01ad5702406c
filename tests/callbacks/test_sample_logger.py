import io

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_draft.callbacks import AdapterEMA, SampleLogger
from lightning_draft.callbacks.image_grid import comparison, log_image, to_pil_image
from lightning_draft.data import PromptDataModule
from lightning_draft.errors import ConfigurationError
from lightning_draft.samplers import DDIM
from lightning_draft.testing import LinearModel, LinearReward

SIZE = 16


def pixels(image):
    """Convert an image `(3, H, W)` to 8-bit pixels, enlarged to sides of 16."""
    small = (image.clamp(0, 1) * 255).round().byte()
    factor = SIZE // small.shape[-1]
    return small.repeat_interleave(factor, 1).repeat_interleave(factor, 2).permute(1, 2, 0).numpy()


def contains(image, part):
    """Return whether `part` occurs exactly somewhere in `image`."""
    windows = np.lib.stride_tricks.sliding_window_view(np.asarray(image), part.shape)
    return bool((windows == part).all(axis=(-3, -2, -1)).any())


def expected(module, prompts, seed):
    noise = module.model.noise(len(prompts), torch.Generator().manual_seed(seed))
    images = module.generate(prompts, noise=noise, seed=seed).images
    return images, module.score(images, prompts)["reward"]


def test_files_contain_base_and_fine_tuned_images(make_module, make_trainer, data, tmp_path):
    prompts = ["a cat", "a dog"]
    callback = SampleLogger(every_n_steps=3, prompts=prompts, seed=5, min_size=SIZE)
    module = make_module(model=LinearModel(0.9))
    make_trainer(callback, max_steps=4).fit(module, data)
    folder = tmp_path / "samples"
    assert sorted(path.name for path in folder.iterdir()) == ["step_000000.png", "step_000003.png", "step_000004.png"]
    base, _ = expected(make_module(model=LinearModel(0.9)), prompts, 5)
    tuned, _ = expected(module, prompts, 5)
    start, end = (Image.open(folder / f"step_00000{step}.png") for step in (0, 4))
    for i in range(2):
        assert contains(start, pixels(base[i]))
        assert contains(end, pixels(base[i]))
        assert contains(end, pixels(tuned[i]))
        assert not contains(start, pixels(tuned[i]))


def test_logged_rewards_use_the_same_noise(make_module, make_trainer, data, logger):
    prompts = ["a cat", "a dog", "a bird"]
    callback, module = SampleLogger(every_n_steps=2, prompts=prompts, seed=3, to_files=False), make_module()
    make_trainer(callback, logger=logger, max_steps=5).fit(module, data)
    calls = logger.of("samples/")
    assert [step for step, _ in calls] == [0, 2, 4, 5]
    _, base = expected(make_module(), prompts, 3)
    _, tuned = expected(module, prompts, 3)
    assert {metrics["samples/reward_base"] for _, metrics in calls} == {base.float().mean().item()}
    assert calls[0][1]["samples/reward"] == calls[0][1]["samples/reward_base"]
    assert calls[-1][1]["samples/reward"] == tuned.float().mean().item()


def test_evaluation_rewards_of_the_images_are_logged(make_module, make_trainer, data, logger):
    module = make_module(eval_rewards={"other": LinearReward(weight=-2.0)})
    make_trainer(SampleLogger(prompts=["a cat", "a dog"], to_files=False), logger=logger, max_steps=2).fit(module, data)
    (_, first), *_ = calls = logger.of("samples/")
    assert first["samples/other"] == first["samples/other_base"]
    images, _ = expected(module, ["a cat", "a dog"], 0)
    scores = module.score(images, ["a cat", "a dog"])["other"]
    assert calls[-1][1]["samples/other"] == pytest.approx(scores.float().mean().item())


def test_fine_tuned_images_use_the_average_if_there_is_one(make_module, make_trainer, data, logger):
    ema, module = AdapterEMA(0.5, warmup=False), make_module()
    make_trainer(SampleLogger(prompts=["a cat"], to_files=False), ema, logger=logger).fit(module, data)
    trained = module.model.theta.item()
    module.model.theta.data.copy_(ema.average["model.theta"])
    _, reward = expected(module, ["a cat"], 0)
    assert trained != module.model.theta.item()
    assert logger.of("samples/")[-1][1]["samples/reward"] == reward.float().mean().item()


@pytest.mark.parametrize("batch_size", [1, 2])
def test_batch_size_does_not_change_the_images(make_diffusion_module, make_trainer, data, tmp_path, batch_size):
    prompts = ["red cat", "cat", "red"]
    for name, size in (("whole", None), ("parts", batch_size)):
        callback = SampleLogger(prompts=prompts, batch_size=size, dirpath=str(tmp_path / name))
        make_trainer(callback, max_steps=1).fit(make_diffusion_module(), data)
    whole, parts = (np.asarray(Image.open(tmp_path / name / "step_000001.png")) for name in ("whole", "parts"))
    # A batched matrix product may round otherwise: by one level of 255, which also may move a digit of a caption.
    assert (np.abs(whole.astype(int) - parts.astype(int)) > 1).mean() < 0.01


def test_tensorboard_receives_the_image_of_the_file(make_module, make_trainer, data, tmp_path):
    logger = TensorBoardLogger(tmp_path, name="run", version="0")
    make_trainer(SampleLogger(every_n_steps=2, prompts=["a cat"]), logger=logger, max_steps=2).fit(make_module(), data)
    events = EventAccumulator(logger.log_dir, size_guidance={"images": 0})
    events.Reload()
    images = events.Images("samples")
    assert [event.step for event in images] == [0, 2]
    written = Image.open(tmp_path / "run" / "0" / "samples" / "step_000002.png")
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(images[-1].encoded_image_string))), np.asarray(written))
    assert {"samples/reward", "samples/reward_base"} <= set(events.Tags()["scalars"])


def test_default_prompts_are_the_held_out_ones(make_module, make_trainer, logger, tmp_path):
    data = PromptDataModule(["x", "y"], val_prompts=["one", "two", "three"], batch_size=2)
    module = make_module()
    make_trainer(SampleLogger(max_samples=2, to_files=False), logger=logger, max_steps=1).fit(module, data)
    _, reward = expected(module, ["one", "two"], 0)
    assert logger.of("samples/")[-1][1]["samples/reward"] == reward.float().mean().item()
    assert not (tmp_path / "samples").exists()


def test_error_without_prompts_says_what_to_write(make_module, make_trainer):
    data = PromptDataModule(["x", "y"], val_size=0)
    with pytest.raises(ConfigurationError, match="has no prompts, .*; set prompts="):
        make_trainer(SampleLogger()).fit(make_module(), data)


@pytest.mark.parametrize("sampler", [DDIM(4), DDIM(4, eta=1.0)])
def test_training_with_the_callback_equals_training_without(make_module, make_trainer, data, sampler):
    """The states of the global generators and the mode are compared too."""

    class RandomNumbers(Callback):
        def __init__(self):
            self.numbers = []

        def on_train_batch_start(self, trainer, pl_module, *_):
            self.numbers.append((torch.rand(()).item(), np.random.rand(), pl_module.training))

    traces = []
    for callbacks in ([], [SampleLogger(every_n_steps=1, prompts=["a cat"])]):
        torch.manual_seed(0)
        np.random.seed(0)
        recorder, module = RandomNumbers(), make_module(sampler=sampler)
        make_trainer(recorder, *callbacks).fit(module, data)
        traces.append((recorder.numbers, module.model.theta.item(), torch.rand(()).item()))
    assert traces[0] == traces[1]


class ImageClient:
    """Accepts images as an experiment tracker's client does, and records the call."""

    def __init__(self):
        self.calls = []

    def log_image(self, *args, **options):
        self.calls.append((args, options))


IMAGE = Image.new("RGB", (2, 2))


def test_a_logger_with_log_image_is_used(logger):
    """As `WandbLogger.log_image(key, images, step)`."""
    logger.log_image = (taker := ImageClient()).log_image
    assert log_image(logger, "samples", IMAGE, 7)
    assert taker.calls == [((), {"key": "samples", "images": [IMAGE], "step": 7})]


def test_an_mlflow_client_is_used(logger, monkeypatch):
    """As `MlflowClient.log_image(run_id, image, key=, step=)`."""
    monkeypatch.setattr(type(logger), "experiment", taker := ImageClient())
    logger.run_id = "run"
    assert log_image(logger, "samples", IMAGE, 7)
    assert taker.calls == [(("run", IMAGE), {"key": "samples", "step": 7})]


def test_a_comet_experiment_is_used(logger, monkeypatch):
    """As `Experiment.log_image(image_data, name=, step=)`."""
    monkeypatch.setattr(type(logger), "experiment", taker := ImageClient())
    assert log_image(logger, "samples", IMAGE, 7)
    assert taker.calls == [((IMAGE,), {"name": "samples", "step": 7})]


def test_images_that_no_logger_accepts_give_one_warning(make_module, make_trainer, data, logger):
    callback = SampleLogger(every_n_steps=1, prompts=["a cat"], to_files=False)
    with pytest.warns(UserWarning, match="images are not saved") as caught:
        make_trainer(callback, logger=logger).fit(make_module(), data)
    assert sum("are not saved" in str(warning.message) for warning in caught) == 1


def test_logger_that_accepts_no_images_is_named_with_the_folder(
    make_module, make_trainer, data, logger, caplog, tmp_path
):
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        make_trainer(SampleLogger(prompts=["a cat"]), logger=logger).fit(make_module(), data)
    lines = [record.message for record in caplog.records if "accepts no images" in record.message]
    assert lines == [f"SampleLogger: RecordingLogger accepts no images; they are in {tmp_path / 'samples'}"]


def test_small_images_are_enlarged_by_integer_factors():
    image = torch.rand(3, 5, 7)
    assert to_pil_image(image, 16).size == (28, 20)
    assert to_pil_image(image, 5).size == (7, 5)
    grown = np.asarray(to_pil_image(image, 16))
    assert np.array_equal(grown[::4, ::4], np.asarray(to_pil_image(image, 5)))


def test_out_of_range_pixels_are_clamped():
    assert to_pil_image(torch.tensor([-1.0, 0.5, 2.0]).view(3, 1, 1), 1).getpixel((0, 0)) == (0, 128, 255)


def test_every_panel_has_its_prompt_and_captions():
    """There is text above the images and below each; a long prompt is truncated to the width of its panel."""
    images = {label: torch.ones(3, 3, 8, 8) for label in ("base", "tuned")}
    scores = {label: torch.tensor([0.5, -0.25, 1.0]) for label in images}
    prompts = ["a cat", "word " * 100, "a bird"]
    plain = comparison(prompts, images, scores, min_size=64, per_row=2)
    titled = comparison(prompts, images, scores, min_size=64, per_row=2, title="step 3")
    assert (titled.width, titled.height) == (plain.width, plain.height + 20)
    assert (np.asarray(titled)[:24].mean(-1) < 128).sum() > 20
    assert np.array_equal(np.asarray(titled)[28:], np.asarray(plain)[8:])

    grid = np.asarray(plain).mean(-1)
    height, width = (side // 2 for side in grid.shape)
    panels = [grid[row : row + height, col : col + width] for row in (0, height) for col in (0, width)]
    for panel in panels[:3]:
        assert (panel[:32] < 128).sum() > 20
        assert (panel[-32:, : width // 2] < 128).sum() > 20
        assert (panel[-32:, width // 2 :] < 128).sum() > 20
    assert panels[3][10:, 10:].min() == 255


def test_accents_and_other_alphabets_are_rendered():
    """Missing characters would all be rendered as the same box."""
    image = {"base": torch.ones(1, 3, 8, 8)}
    rendered = {
        comparison([text], image, {"base": torch.zeros(1)}, min_size=64).tobytes() for text in "\u00fc\u03c9\u0436"
    }
    assert len(rendered) == 3


@pytest.mark.parametrize("option", ["every_n_steps", "max_samples", "min_size", "per_row", "batch_size"])
def test_invalid_arguments_are_rejected(option):
    with pytest.raises(ConfigurationError, match=f"{option}=0 must be at least 1"):
        SampleLogger(**{option: 0})


def test_scores_are_shown_whole_below_small_images_with_long_labels():
    label, image = "fine_tuned_" * 9, torch.zeros(1, 3, 8, 8)
    grids = [comparison(["a"], {label: image}, {label: torch.tensor([score])}) for score in (-0.1234, -0.1235)]
    assert grids[0].tobytes() != grids[1].tobytes()
