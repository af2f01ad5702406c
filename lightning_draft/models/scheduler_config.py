"""Noise schedules and prediction types, read from the scheduler configs of pipelines."""

import math
from typing import Any

from lightning_draft.errors import ConfigurationError
from lightning_draft.models.base import Prediction
from lightning_draft.schedules import EmpiricalFlow, GridEnd, RectifiedFlow, TrigonometricFlow, VariancePreserving

_OTHER_GRIDS = (
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "invert_sigmas",
)


def variance_preserving(scheduler: Any) -> tuple[VariancePreserving, Prediction]:
    """Return the schedule and prediction type of a pipeline trained with noise levels `alpha^2 + sigma^2 = 1`.

    Raises:
        ConfigurationError: The scheduler is of another family, thresholds samples, or has a prediction type that is
            not supported or does not suit its noise levels.
    """
    config, name = scheduler.config, type(scheduler).__name__
    prediction = config.get("prediction_type", "epsilon")
    table = getattr(scheduler, "alphas_cumprod", None)
    if table is None:
        raise ConfigurationError(
            f"the pipeline's {name} has no alphas_cumprod; replace its config by that of a DDIMScheduler"
        )
    if config.get("thresholding"):
        raise ConfigurationError(
            f"the pipeline's {name} has thresholding=True, which distorts latents and removes a part of the gradient; "
            "set it to false in scheduler/scheduler_config.json"
        )
    if prediction not in ("epsilon", "v_prediction", "sample"):
        raise ConfigurationError(
            f"prediction_type={prediction!r} of the pipeline's {name} is not supported; it must be epsilon, "
            "v_prediction or sample"
        )
    if prediction == "epsilon":
        _check_signal(config, name, float(table.min()))
    schedule = VariancePreserving.from_table(
        table,
        set_alpha_to_one=config.get("set_alpha_to_one", True),
        spacing=config.get("timestep_spacing", "leading"),
        steps_offset=config.get("steps_offset", 0),
    )
    return schedule, prediction


def _check_signal(config: Any, name: str, last: float) -> None:
    """Check that a prediction of the noise determines the image at the first step of sampling.

    Args:
        config: Config of the scheduler.
        name: Its class.
        last: `alpha^2` of the last timestep; some schedulers have 2^-24 instead of 0.

    Raises:
        ConfigurationError: There is no signal at this step.
    """
    if last >= 1e-6:
        return
    if last == 0 or config.get("rescale_betas_zero_snr"):
        raise ConfigurationError(
            f"the pipeline's {name} has rescale_betas_zero_snr=True with prediction_type=epsilon: without signal, a "
            "prediction of the noise does not determine the image; set rescale_betas_zero_snr to false, or use a "
            "v_prediction model"
        )
    spacing = config.get("timestep_spacing", "leading")
    if spacing != "leading":  # a leading grid does not contain the last timestep
        raise ConfigurationError(
            f"the pipeline's {name} has timestep_spacing={spacing} with beta_schedule={config.get('beta_schedule')} "
            f"and prediction_type=epsilon: the last timestep, alpha^2 = {last:.1g}, has almost no signal; set "
            "timestep_spacing to leading in scheduler/scheduler_config.json"
        )


def rectified_flow(scheduler: Any, last: GridEnd = "shifted", tokens: int | None = None) -> RectifiedFlow:
    """Return the schedule of a pipeline trained with a rectified flow.

    Args:
        scheduler: The scheduler of the pipeline.
        last: Where its pipeline ends the grid, see `RectifiedFlow`.
        tokens: Number of the image's tokens, for families whose shift depends on it.

    Raises:
        ConfigurationError: The scheduler is of another family, or its grid is of a kind that is not supported.
    """
    config, name = scheduler.config, type(scheduler).__name__
    if config.get("use_flow_sigmas"):  # a solver of higher order on the same flow
        return RectifiedFlow(config.get("flow_shift", 1.0), config.get("num_train_timesteps", 1000), "even")
    if not name.startswith("FlowMatch"):
        raise ConfigurationError(
            f"the pipeline's {name} is not made for rectified flows; replace its config by that of a "
            "FlowMatchEulerDiscreteScheduler"
        )
    others = [key for key in _OTHER_GRIDS if config.get(key)]
    if tokens is None and config.get("use_dynamic_shifting"):
        others.append("use_dynamic_shifting")
    if others:
        raise ConfigurationError(
            f"the pipeline's {name} has {others[0]}={config[others[0]]}, which the samplers do not support; remove "
            f"{others[0]} from scheduler/scheduler_config.json and set shift, which is 3.0 in the published models"
        )
    shift = config.get("shift", 1.0)
    if tokens is not None and config.get("use_dynamic_shifting"):
        shift = _dynamic_shift(config, tokens)
    return RectifiedFlow(shift, config.get("num_train_timesteps", 1000), last, config.get("shift_terminal"))


def _dynamic_shift(config: Any, tokens: int) -> float:
    """Return `exp(mu)` with `mu` linear in the number of tokens; or `mu` itself for a linear time shift."""
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    base, most = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    mu: float = base + (most - base) * (tokens - low) / (high - low)
    return mu if config.get("time_shift_type") == "linear" else math.exp(mu)


def empirical_flow(scheduler: Any, tokens: int) -> RectifiedFlow:
    """Return the schedule of FLUX.2, whose shift depends on the numbers of tokens and of steps.

    Args:
        scheduler: The scheduler of the pipeline.
        tokens: Number of the image's tokens.

    Raises:
        ConfigurationError: See `rectified_flow`.
    """
    flow = rectified_flow(scheduler, "even", tokens)
    if not scheduler.config.get("use_dynamic_shifting"):
        return flow
    return EmpiricalFlow(flow.shift, flow.num_train_timesteps, "even", flow.terminal, tokens)


def trigonometric_flow(scheduler: Any) -> TrigonometricFlow:
    """Return the schedule of a pipeline trained with a trigonometric flow, in the units of a rectified flow.

    Raises:
        ConfigurationError: The scheduler is of another family.
    """
    if scheduler.config.get("prediction_type") != "trigflow":
        raise ConfigurationError(
            f"the pipeline's {type(scheduler).__name__} is not made for trigonometric flows; replace its config by "
            "that of an SCMScheduler with prediction_type=trigflow"
        )
    return TrigonometricFlow(num_train_timesteps=scheduler.config.num_train_timesteps)
