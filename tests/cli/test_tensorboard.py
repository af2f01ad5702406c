"""What the command line's logger shows: no `epoch`, the configuration, and charts of tags that are logged."""

import re
from pathlib import Path
from types import SimpleNamespace

from lightning.pytorch.loggers import CSVLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from lightning_draft.callbacks.artifacts import log_card
from lightning_draft.cli.tensorboard import RunLogger, charts, describe_run
from lightning_draft.model_card import model_card

LOGGED = {"samples/reward", "samples/reward_base", "samples/judge", "samples/judge_base", "val/reward", "val/judge"}
LOGGED |= {"train/reward", "train/gradient_norm/total"}


def test_epoch_is_not_logged(tmp_path: Path) -> None:
    logger = RunLogger(tmp_path / "run")
    logger.log_metrics({"train/reward": 1.0, "epoch": 3.0}, 2)
    loggers = [logger, CSVLogger(tmp_path / "csv")]
    describe_run(loggers, "a: 1", ["reward", "judge"])
    card = model_card("bright", {"base": "emoji64"}, "StableDiffusionPipeline", 4, comfy=False)
    log_card(SimpleNamespace(loggers=loggers, global_step=5), card)
    logger.save()
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    tags = events.Tags()
    assert tags["scalars"] == ["train/reward"]
    (config,) = (event for event in events.Tensors("config/text_summary"))
    assert config.tensor_proto.string_val == [b"```yaml\na: 1```"]
    (shown,) = events.Tensors("card/text_summary")
    text = shown.tensor_proto.string_val[0].decode()
    assert (shown.step, text.strip().splitlines()[0]) == (5, "# bright")
    assert "license: " not in text
    (layout,) = events.Tensors("custom_scalars__config__")
    categories = layout_pb2.Layout.FromString(layout.tensor_proto.string_val[0]).category
    assert [category.title for category in categories] == ["rewards", "training"]


def test_every_tag_is_in_a_chart() -> None:
    layout = charts(["reward", "judge"])
    patterns = [pattern for category in layout.values() for _, tags in category.values() for pattern in tags]
    assert {tag for tag in LOGGED if any(re.match(pattern, tag) for pattern in patterns)} == LOGGED
    assert all(any(re.match(pattern, tag) for tag in LOGGED) for pattern in patterns)
