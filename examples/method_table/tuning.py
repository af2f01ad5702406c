"""Tune a method with Optuna, at the same CPU seconds for every method."""

from collections.abc import Callable
from pathlib import Path

import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

Options = dict[str, float]
Report = Callable[[float, int], bool]
"""Takes the score at a milestone and its number; returns whether the trial should end there."""


def around(first: Options, ranges: dict[str, tuple[float, float]]) -> dict[str, BaseDistribution]:
    """Return log-uniform distributions: the given ranges, or a quarter to four times the first value."""
    bounds = {name: ranges.get(name, (value / 4, value * 4)) for name, value in first.items()}
    return {name: FloatDistribution(low, high, log=True) for name, (low, high) in bounds.items()}


def tune(
    file: Path,
    method: str,
    first: Options,
    space: dict[str, BaseDistribution],
    seconds: float,
    run: Callable[[Options, Report], float],
) -> Options:
    """Return the options of the best trial, or `first` if the scores of no trial are finite.

    The first trial has the options `first`; then Optuna's tree-structured Parzen estimator proposes trials until
    together they have used `seconds`. A trial ends early if its score is below the median of the earlier trials at the
    same milestone. An interrupted study continues where it stopped.

    Args:
        file: File of all studies.
        method: Name of the study.
        first: Options that are tried first.
        space: Distribution of each option.
        seconds: CPU seconds of all trials together.
        run: Trains with options, calls the report at each milestone, and returns the CPU seconds used.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    file.parent.mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(file))),
        study_name=method,
        load_if_exists=True,
        direction="maximize",
        sampler=optuna.samplers.TPESampler(seed=0, n_startup_trials=3),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=1),
    )
    if not study.trials:
        study.enqueue_trial(first)
    while _spent(study) < seconds:
        _run_trial(study, space, run)
    finished = study.get_trials(states=[TrialState.COMPLETE])
    return dict(study.best_params) if finished else first


def _spent(study: optuna.Study) -> float:
    return float(sum(trial.user_attrs.get("seconds", 0.0) for trial in study.trials))


def _run_trial(
    study: optuna.Study, space: dict[str, BaseDistribution], run: Callable[[Options, Report], float]
) -> None:
    trial = study.ask(space)
    score = 0.0

    def report(value: float, milestone: int) -> bool:
        """Store the score at a milestone, and return whether the trial should end there."""
        nonlocal score
        score = value
        trial.report(value, milestone)
        return trial.should_prune()

    trial.set_user_attr("seconds", run(trial.params, report))
    if trial.should_prune():
        study.tell(trial, state=TrialState.PRUNED)
    else:
        study.tell(trial, score)
