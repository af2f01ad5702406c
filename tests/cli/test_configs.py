"""Shipped configs run for one step with a small random pipeline; `test_readme.py` runs the quickstart as written."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import lightning_draft
from lightning_draft.callbacks import OverOptimizationGuard
from lightning_draft.cli import shipped
from tests.tiny_families import write

NAMES = shipped.names()
EMOJI = [name for name in NAMES if "pretrained: emoji" in shipped.locate(name).read_text(encoding="utf-8")]
METHODS = {
    "draft": "Full",
    "draft_1": "LastK",
    "draft_k": "LastK",
    "draft_lv": "LowVariance",
    "draft_plus": "LastK",
    "anchor": "LastK",
    "refl": "ReFL",
    "alignprop": "RandomSteps",
    "alignprop_paper": "RandomK",
    "drtune": "DRTune",
    "flow_bp_sparse": "DRTune",
    "flow_bp_bridge": "FlowBPBridge",
    "flow_bp_lagrange": "FlowBPLagrange",
    "leap_align": "LeapAlign",
    "direct_align": "DirectAlign",
    "srpo": "DirectAlign",
}
POLICIES = {
    "reinforce": ("Reinforce", "PerPromptStatistics"),
    "ppo": ("PPO", "PerPromptStatistics"),
    "loop": ("PPO", "LeaveOneOut"),
    "flow_grpo": ("PPO", "GroupRelative"),
    "prdp": ("PRDP", "GroupRelative"),
    "value_baseline": ("PPO", "PerPromptStatistics"),
    "apa": ("APA", "PerPromptStatistics"),
    "grpo_guard": ("GRPOGuard", "PerPromptStatistics"),
    "flow_dppo": ("FlowDPPO", "PerPromptStatistics"),
    "sample_dropout": ("SampleDropout", "PerPromptStatistics"),
    "pref_grpo": ("PPO", "WinRate"),
    "prdp_preferences": ("PRDP", "BradleyTerry"),
    "gardo": ("PPO", "DiversityAware"),
}
WINDOWS = {"mix_grpo": "SlidingWindow", "flow_grpo_fast": "RandomWindow"}
FORWARD = {
    "nft": "DiffusionNFT",
    "awm": "AWM",
    "rwr": "RWR",
    "online_dpo": "OnlineDPO",
    "dgpo": "DGPO",
    "crd": "CRD",
}
MATCHING = {"adjoint_matching": "AdjointMatching", "nabla_gflownet": "NablaGFlowNet", "vgg_flow": "VGGFlow"}
TINY = {
    "trainer.max_steps": 1,
    "trainer.accelerator": "cpu",
    "trainer.accumulate_grad_batches": 1,
    "trainer.val_check_interval": 1,
    "model.micro_batch_size": "null",
    "data.batch_size": 2,
    "data.val_size": 1,
}


PIPELINES = {"StableDiffusion": "tiny_sd", "StableDiffusion3": "tiny_sd3", "StableDiffusionXL": "tiny_sdxl"}
FAMILIES = {
    "Flux": "flux",
    "Flux2Klein": "flux_2_klein",
    "PixArtSigma": "pixart_sigma",
    "Sana": "sana",
    "SanaSprint": "sana_sprint",
    "Chroma": "chroma",
    "ZImage": "z_image",
    "QwenImage": "qwen_image",
    "PixelDiffusion": "pixels",
}


@pytest.fixture(scope="session")
def pipeline(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a small random pipeline for a model class."""
    root = tmp_path_factory.mktemp("families")

    def folder(model: str) -> Path:
        if model in PIPELINES:
            return request.getfixturevalue(PIPELINES[model])
        return root / model if (root / model).exists() else write(FAMILIES[model], root / model)

    return folder


def _options(values: dict[str, object]) -> list[str]:
    return [part for key, value in values.items() for part in (f"--{key}", str(value))]


def _content(name: str) -> dict:
    return yaml.safe_load(shipped.locate(name).read_text(encoding="utf-8"))


def _class(value: str | dict) -> str:
    return value if isinstance(value, str) else value["class_path"]


SHARDED = ["sd15_prdp_full"]
"""Configs of several processes, which `test_distributed_commands.py` runs."""


DERIVED = {
    **{f"sd35_{name}_clip": "sd35_nft_clip" for name in ("awm", "rwr", "online_dpo", "dgpo", "crd")},
    **{f"sd35_{name}_clip": "sd35_adjoint_matching_clip" for name in ("vgg_flow", "nabla_gflownet")},
    **{
        f"sd35_{name}_clip": "sd35_flow_bp_lagrange_clip" for name in ("flow_bp_sparse", "flow_bp_bridge", "leap_align")
    },
    **dict.fromkeys(("sd3_pref_grpo", "sd3_dance_grpo"), "sd3_flow_grpo"),
    "sd15_apa_clip": "sd15_loop_clip",
    "sd15_guard_clip": "sd15_draft_k_clip",
}
"""Configs that differ from another one in the method alone; the method runs with the config of the shipped model."""

STRATEGIES = ("sampler", "truncation", "objective", "advantage_estimator", "matching")
METHOD_OPTIONS = (
    *STRATEGIES,
    "old_policy",
    "kl_weight",
    "kl_per_time",
    "share_start_noise",
    "micro_batch_size",
    "eval_rewards",
    "optimizer",
)


@pytest.mark.parametrize("name", DERIVED)
def test_config_differs_only_in_the_method_from_one_that_runs(name: str) -> None:
    def rest(content: dict) -> dict:
        arguments = {k: v for k, v in content["model"]["init_args"].items() if k not in METHOD_OPTIONS}
        trainer = {k: v for k, v in content["trainer"].items() if k != "accumulate_grad_batches"}
        content = {k: v for k, v in content.items() if k != "guard"}
        return {**content, "model": {**content["model"], "init_args": arguments}, "trainer": trainer}

    content = _content(name)
    assert rest(content) == rest(_content(DERIVED[name]))
    arguments = content["model"]["init_args"]
    if "guard" in content:
        assert OverOptimizationGuard(**content["guard"]["init_args"]).min_diversity is not None
        assert arguments["eval_rewards"]
    built = {key: _built(arguments[key]) for key in STRATEGIES if key in arguments}
    if content["model"]["class_path"] == "ForwardProcessModule":
        samples, part = content["data"]["batch_size"] * arguments["samples_per_prompt"], arguments["micro_batch_size"]
        assert content["trainer"]["accumulate_grad_batches"] == samples // part * arguments["num_times"]
        assert not built["objective"].couples_group or part % arguments["samples_per_prompt"] == 0


def _built(value: Any) -> Any:
    """The object of a class name, or of `class_path` and `init_args`."""
    options = value.get("init_args", {}) if isinstance(value, dict) else {}
    made = {key: _built(each) if isinstance(each, dict) else each for key, each in options.items()}
    return getattr(lightning_draft, _class(value))(**made)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("quickstart", *SHARDED, *DERIVED)])
def test_shipped_config_runs(command: Callable, name: str, pipeline: Callable, tiny_clip: Path) -> None:
    arguments = _content(name)["model"]["init_args"]
    models = {"model.model.pretrained": pipeline(arguments["model"]["class_path"])}
    if "height" in arguments["model"]["init_args"]:
        models |= {"model.model.height": 32, "model.model.width": 32}
    reward = arguments["reward"]
    if isinstance(reward, dict) and "processor" in reward.get("init_args", {}):
        models["model.reward.processor"] = tiny_clip
    if isinstance(reward, dict) and reward.get("init_args", {}).get("pretrained", "emoji64-judge") != "emoji64-judge":
        models["model.reward.pretrained"] = tiny_clip
    if isinstance(reward, dict) and "reward" in reward.get("init_args", {}):
        models["model.reward.reward.pretrained"] = tiny_clip
    if isinstance(reward, dict) and "captions" in reward.get("init_args", {}):
        models["model.reward.captions"] = "animals"
    if _class(_content(name)["model"]) in ("PolicyGradientModule", "ForwardProcessModule"):
        models |= {"model.timesteps_per_minibatch": "null", "model.samples_per_prompt": 2}
    if name in EMOJI:
        models |= {"data.prompts": "animals", "data.val_prompts": "null", "model.eval_rewards": "null"}
    if name in ("guard", "gardo", "sd3_gardo"):
        models["model.eval_rewards"] = '{"judge": {"class_path": "Brightness"}}'
    if name == "guard":
        models["guard.max_prompts"] = 1
    if _class(arguments.get("advantage_estimator", "")) == "DiversityAware":
        models["model.advantage_estimator.pretrained"] = tiny_clip
    if name not in EMOJI:
        models["model.sampler.num_steps"] = 10
    writes = name == "guard"
    result = command("fit", "--config", name, *_options(TINY | models | {"trainer.fast_dev_run": not writes}))
    assert result.status == 0, result.err
    assert "step 1/1" in result.out + result.err
    for adapters in ("best", "guarded"):
        assert Path(f"runs/{name}/lora/{adapters}.safetensors").is_file() == writes


def test_every_method_has_a_config() -> None:
    from lightning_draft.cli.hints import subclasses
    from lightning_draft.truncation import Truncation

    classes = {name: _class(_content(name)["model"]["init_args"]["truncation"]) for name in METHODS}
    assert classes == METHODS
    known = {kind.__name__ for kind in subclasses((Truncation,)) if kind.__module__.startswith("lightning_draft.")}
    assert set(METHODS.values()) == known
    assert set(EMOJI) == {*METHODS, *POLICIES, *WINDOWS, *FORWARD, *MATCHING, "quickstart", "guard", "compositions"}


def test_every_forward_objective_has_a_config() -> None:
    from lightning_draft.cli.hints import subclasses
    from lightning_draft.forward_objectives import ForwardObjective

    classes = {name: _class(_content(name)["model"]["init_args"]["objective"]) for name in FORWARD}
    assert classes == FORWARD
    known = {
        each.__name__ for each in subclasses((ForwardObjective,)) if each.__module__.startswith("lightning_draft.")
    }
    assert set(FORWARD.values()) == known


def test_every_objective_and_advantage_estimator_has_a_config() -> None:
    import lightning_draft.cli.options  # noqa: F401 (it imports all classes)
    from lightning_draft.advantages import AdvantageEstimator
    from lightning_draft.cli.hints import subclasses
    from lightning_draft.objectives import Objective

    for kind, key, index in ((Objective, "objective", 0), (AdvantageEstimator, "advantage_estimator", 1)):
        classes = {name: _class(_content(name)["model"]["init_args"][key]) for name in POLICIES}
        assert classes == {name: parts[index] for name, parts in POLICIES.items()}
        known = {each.__name__ for each in subclasses((kind,)) if each.__module__.startswith("lightning_draft.")}
        assert set(classes.values()) == known


def test_every_window_has_a_config() -> None:
    from lightning_draft.cli.hints import subclasses
    from lightning_draft.windows import StepWindow

    classes = {name: _class(_content(name)["model"]["init_args"]["window"]) for name in WINDOWS}
    assert classes == WINDOWS
    assert set(WINDOWS.values()) == {each.__name__ for each in subclasses((StepWindow,))}


def _sampled_steps(name: str) -> int:
    """Return the trained steps of a config: its window, or all on the grid of its model except one without noise."""
    arguments = _content(name)["model"]["init_args"]
    if "window" in arguments:
        return int(arguments["window"]["init_args"]["size"])
    steps = arguments["sampler"]["init_args"]["num_steps"]
    return steps if name.startswith("sd15_") else steps - 1


@pytest.mark.parametrize("name", [name for name in NAMES if _class(_content(name)["model"]) == "PolicyGradientModule"])
def test_optimizer_steps_of_policy_configs_end_with_epochs(name: str) -> None:
    """For the Trainer and the model of the config; a small model may have another number of minibatches."""
    content = _content(name)
    arguments = content["model"]["init_args"]
    samples = content["data"]["batch_size"] * arguments.get("samples_per_prompt", 1)
    parts = _sampled_steps(name) * (samples // arguments.get("micro_batch_size", samples))
    accumulate = content["trainer"]["accumulate_grad_batches"]
    assert parts % accumulate == 0
    assert content["trainer"]["val_check_interval"] % accumulate == 0
    if _class(arguments["objective"]) in ("Reinforce", "PRDP"):
        assert parts == accumulate


def test_method_configs_differ_only_in_the_method() -> None:
    method = (
        "truncation",
        "kl_weight",
        "kl_gate",
        "kl_reference",
        "anchor",
        "objective",
        "advantage_estimator",
        "value_baseline",
        "inner_epochs",
        "old_policy",
        "matching",
    )
    number_of_steps = ("val_check_interval", "accumulate_grad_batches")

    def rest(name: str) -> dict:
        content = _content(name)
        arguments = content["model"]["init_args"]
        return {**content, "model": {key: value for key, value in arguments.items() if key not in method}}

    def without_window(name: str) -> dict:
        content = rest(name)
        trainer = {key: value for key, value in content["trainer"].items() if key not in number_of_steps}
        model = {key: value for key, value in content["model"].items() if key != "window"}
        return {**content, "trainer": trainer, "model": model}

    assert all(rest(name) == rest("draft") for name in METHODS)
    assert all(without_window(name) == without_window("ppo") for name in WINDOWS)
    assert all(rest(name) == rest("ppo") for name in POLICIES)
    assert all(rest(name) == rest("nft") for name in FORWARD)
    assert all(rest(name) == rest("vgg_flow") for name in MATCHING)


def test_last_step_of_configs_that_train_only_it_uses_the_network() -> None:
    """On the grid of SD 1.x's scheduler file the coefficient is small, which gives a warning before training."""
    for name in set(NAMES) - set(EMOJI):
        arguments = _content(name)["model"]["init_args"]
        if arguments.get("truncation", {}) in (
            {"class_path": "LowVariance", "init_args": {"copies": 2}},
            {"class_path": "LastK", "init_args": {"k": 1}},
        ):
            assert arguments["sampler"]["init_args"]["spacing"] == "trailing", name


def test_configs_of_models_with_a_large_text_encoder_cache_embeddings_on_the_disk() -> None:
    """CLIP is small, and the others are as large as the denoiser or larger."""
    with_clip = {"StableDiffusion", "StableDiffusionXL", "PixelDiffusion"}
    for name in set(NAMES) - set(EMOJI):
        model = _content(name)["model"]["init_args"]["model"]
        if model["class_path"] not in with_clip:
            assert model["init_args"]["text"] == {"cache": "embeddings"}, name


def test_listing_describes_each_config(command: Callable) -> None:
    listed = command("configs", "list").out.splitlines()
    assert [line.split()[0] for line in listed] == NAMES
    assert NAMES[0] == "quickstart"
    assert all(len(line.split()) > 5 and line.rstrip().endswith(".") for line in listed)
    assert command("configs", "show", "draft_k").out == shipped.locate("draft_k").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", NAMES)
def test_shipped_configs_start_with_a_comment_of_one_or_two_lines(name: str) -> None:
    lines = shipped.locate(name).read_text(encoding="utf-8").splitlines()
    comments = [line for line in lines if line.startswith("#")]
    assert 1 <= len(comments) <= 2
    assert lines[: len(comments)] == comments
