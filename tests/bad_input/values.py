"""Values that the options of `fit` cannot have."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from lightning_draft.cli.option_checks import check_options
from tests.bad_input.cases import Case, built, edited, parsed, python

VALUES = "Values out of range"
TOGETHER = "Options that do not go together"
PLACES = "Places to write"


_NOISY = """
from lightning_draft import DDIM, Sampler
class Noisy(DDIM):
    deterministic = Sampler.deterministic
    def __init__(self):
        super().__init__(3, eta=1.0)
"""


def _rollouts(kind: str, options: list[str], *says: str) -> Case:
    """Return a case of `PolicyGradientModule` with two samples per prompt; only the other options are shown."""
    stochastic = ["--model", "PolicyGradientModule", "--model.sampler.eta", "1", "--model.samples_per_prompt", "2"]
    return replace(built(kind, options, *says), args=built(kind, [*stochastic, *options]).args)


def _checked(name: str, values: Iterable[Any]) -> list[Case]:
    return [
        python(
            VALUES,
            f"--{name} {value}",
            lambda _, value=value: check_options({name: value}),
            f"--{name}={value!r} must",
            "write",
        )
        for value in values
    ]


CASES: list[Case] = [
    parsed(VALUES, "--trainer.max_steps 0", "--trainer.max_steps=0 must be at least 1", "write 200"),
    parsed(VALUES, "--name ../../x", "--name='../../x' must be a name inside the folder runs"),
    parsed(VALUES, "--ckpt_path nowhere.ckpt", "there is no checkpoint nowhere.ckpt"),
    parsed(VALUES, "--ckpt_path last", "there is no run runs/small"),
    parsed(VALUES, "--resume auto --ckpt_path x.ckpt", "--resume auto finds the checkpoint itself"),
    *_checked("trainer.max_steps", (-2,)),
    *_checked("trainer.max_epochs", (0, -5)),
    *_checked("trainer.accumulate_grad_batches", (0, -1)),
    *_checked("trainer.gradient_clip_val", (0.0, -1.0, float("nan"), float("inf"))),
    *_checked("trainer.log_every_n_steps", (0, -3)),
    *_checked("trainer.val_check_interval", (0, 0.0)),
    *_checked("trainer.strategy", ("ddp_spawn", "ddp_spawn_find_unused_parameters_true", "ddp_notebook", "ddp_fork")),
    *_checked("trainer.barebones", (True,)),
    *_checked("data.batch_size", (10**9,)),
    *_checked("data.val_batch_size", (10**9,)),
    edited(VALUES, "max_steps: 2", "max_steps: null", "--trainer.max_steps=null must be a number", "write 200"),
    *_checked("trainer.num_sanity_val_steps", (-5,)),
    *_checked("trainer.min_steps", (-1,)),
    *_checked("trainer.min_epochs", (-1,)),
    *_checked("trainer.num_nodes", (0,)),
    *_checked("trainer.devices", ("two", "0;1", "100000")),
    *_checked("trainer.check_val_every_n_epoch", (0, -1)),
    *_checked("trainer.profiler", ("slow",)),
    *_checked("model.lr_scheduler.step_size", (0,)),
    *_checked("model.lr_scheduler.T_max", (0,)),
    *_checked("model.lr_scheduler.T_0", (0,)),
    *_checked("seed_everything", (-1, 2**32, 2**70)),
    *_checked("model.optimizer.lr", (0.0, -1e-3, float("nan"), float("inf"))),
    *_checked("model.optimizer.weight_decay", (-0.1, float("nan"))),
    built(VALUES, "--model.truncation.k 0", "--model.truncation.k=0 must be at least 1"),
    built(VALUES, "--model.truncation.k 99", "k=99"),
    built(VALUES, "--model.truncation.k -1", "--model.truncation.k=-1 must be at least 1"),
    built(VALUES, "--model.sampler.num_steps 0", "--model.sampler.num_steps=0 must be at least 1"),
    built(VALUES, "--model.sampler.num_steps 5000", "5000"),
    built(VALUES, "--model.sampler.eta 2", "--model.sampler.eta=2"),
    built(VALUES, "--model.sampler.eta .nan", "--model.sampler.eta=nan"),
    built(VALUES, "--model.kl_weight -1", "--model.kl_weight=-1"),
    built(VALUES, "--model.kl_weight .nan", "--model.kl_weight=nan"),
    built(VALUES, "--model.kl_weight .inf", "--model.kl_weight=inf"),
    built(VALUES, "--model.micro_batch_size 0", "--model.micro_batch_size=0"),
    built(VALUES, "--model.seed -1", "--model.seed=-1"),
    built(VALUES, "--data.seed 9223372036854775808", "--data.seed=9223372036854775808 must be", "write for example 0"),
    built(VALUES, "--samples SampleLogger --samples.seed -1", "--samples.seed=-1 must be an integer between 0"),
    built(VALUES, "--data.batch_size 0", "--data.batch_size=0 must be at least 1"),
    built(VALUES, "--data.batch_size -2", "--data.batch_size=-2 must be at least 1"),
    built(VALUES, "--data.val_batch_size 0", "--data.val_batch_size=0 must be at least 1"),
    built(VALUES, "--data.val_size -1", "--data.val_size=-1 must be at least 0"),
    built(VALUES, "--data.val_size 7", "--data.val_size=7"),
    built(VALUES, ["--data.prompts", "[]"], "prompts"),
    built(VALUES, ["--data.prompts", "['', ' ']"], "no prompts"),
    built(VALUES, ["--data.val_prompts", "[]"], "prompts"),
    built(VALUES, "--data.prompts nowhere.txt", "there is no file 'nowhere.txt'"),
    built(VALUES, "--data.prompts annimals", "did you mean animals"),
    built(VALUES, "--samples SampleLogger --samples.every_n_steps 0", "--samples.every_n_steps=0 must be at least 1"),
    built(VALUES, "--samples SampleLogger --samples.max_samples 0", "--samples.max_samples=0 must be at least 1"),
    built(VALUES, ["--samples", "SampleLogger", "--samples.prompts", "[]"], "prompts must be a non-empty list"),
    built(VALUES, "--ema AdapterEMA --ema.decay 2", "--ema.decay=2"),
    built(VALUES, "--ema AdapterEMA --ema.decay .nan", "--ema.decay=nan"),
    built(VALUES, "--checkpoint.every_n_steps 0", "--checkpoint.every_n_steps=0"),
    built(VALUES, "--model.loss Hinge --model.loss.threshold .nan", "threshold=nan"),
    built(VALUES, "--model.optimizer AdamW --model.optimizer.lr 1e-3 --model.optimizer.eps -1", "eps"),
    built(VALUES, ["--model.optimizer", "AdamW", "--model.optimizer.betas", "[2.0, 0.9]"], "Invalid beta"),
    built(VALUES, "--model.optimizer SGD --model.optimizer.lr 0.1 --model.optimizer.momentum -1", "momentum"),
    built(VALUES, "--trainer.limit_train_batches -1", "limit_train_batches"),
    built(VALUES, "--trainer.limit_val_batches 1.5", "limit_val_batches"),
    built(VALUES, "--trainer.limit_train_batches 0", "without a step", "limit_train_batches=0", "null for all batches"),
    built(VALUES, "--trainer.max_time 00:00:00:00", "without a step", "max_time='00:00:00:00'", "write larger values"),
    built(VALUES, "--trainer.strategy dpd", "strategy", "'dpd'"),
    built(VALUES, "--trainer.accelerator gpuu", "accelerator", "gpuu"),
    built(VALUES, "--trainer.devices 0", "devices"),
    built(VALUES, "--trainer.devices -3", "devices"),
    built(VALUES, "--trainer.precision 17", "17"),
    built(VALUES, "--trainer.max_time yesterday", "yesterday"),
    built(VALUES, "--trainer.overfit_batches -1", "overfit_batches"),
    built(VALUES, "--trainer.fast_dev_run -1", "fast_dev_run"),
    built(
        VALUES,
        ["--trainer.callbacks", "[{class_path: EarlyStopping, init_args: {monitor: x, mode: most}}]"],
        "`mode` can be min, max, got most",
    ),
    built(
        VALUES,
        ["--trainer.callbacks", "[{class_path: EarlyStopping, init_args: {monitor: val/taste}}]"],
        "val/taste",
        writes=True,
    ),
    built(VALUES, "--model.model.theta .nan", "not finite", "use a wider dtype"),
    built(VALUES, "--model.reward.weight .nan", "LinearReward", "nan"),
    built(VALUES, "--model.reward.weight .inf", "LinearReward"),
    built(VALUES, "--model.reward.weight 0", "LinearReward"),
    built(VALUES, "--model.reward WeightedSum --model.reward.rewards {}", "rewards"),
    built(
        VALUES,
        ["--model.reward", "{class_path: WeightedSum, init_args: {rewards: {a: {reward: Brightness, weight: 0}}}}"],
        "a weight other than 0",
    ),
    built(
        VALUES,
        ["--model.reward", "{class_path: WeightedSum, init_args: {rewards: {a: {reward: Brightness, weight: .nan}}}}"],
        "nan",
    ),
    built(
        VALUES,
        ["--model.reward", "{class_path: WeightedSum, init_args: {rewards: {'a b': {reward: Brightness}}}}"],
        "'a b' cannot be the name of a reward",
    ),
    built(VALUES, "--model.reward JPEGSize", "JPEGSize is not differentiable"),
    built(VALUES, "--model.reward Brightness --model.reward.target .nan", "target=nan must be", "write 0.5"),
    built(TOGETHER, "--model.sampler FlowEuler", "the sampler does not fit the model", "use DDIM or DPMSolver"),
    built(
        TOGETHER, "--model.sampler DPMSolverPlusPlus --model PolicyGradientModule", "DPMSolverPlusPlus", "DDIM(eta=1)"
    ),
    built(TOGETHER, "--model PolicyGradientModule", "eta"),
    built(
        VALUES,
        "--model ForwardProcessModule --model.old_policy null",
        "--model.old_policy: expected an OldPolicy, got null",
        "--model.old_policy.max_decay VALUE",
    ),
    built(TOGETHER, "--model PolicyGradientModule --model.samples_per_prompt 0", "samples_per_prompt=0"),
    built(
        TOGETHER,
        "--model PolicyGradientModule --model.sampler.eta 1 --model.advantage_estimator LeaveOneOut",
        "samples_per_prompt",
    ),
    built(
        TOGETHER,
        "--model PolicyGradientModule --model.sampler.eta 1 --model.window SlidingWindow --model.window.size 4",
        "window.size=4 exceeds the",
        "or less",
    ),
    built(
        TOGETHER,
        "--model PolicyGradientModule --model.sampler mine.Noisy --model.window SlidingWindow --model.window.size 1",
        "sampler=Noisy has no method `deterministic`",
        "write sampler=DDIM(eta=1)",
        files={"mine.py": _NOISY},
    ),
    _rollouts(
        VALUES,
        ["--model.kl_weight", "1", "--model.kl_gate", "{fraction: 2}"],
        "--model.kl_gate.fraction=2.0 must be between 0 and 1",
        "write for example 0.1",
    ),
    _rollouts(
        VALUES,
        ["--model.kl_weight", "1", "--model.kl_reference", "{max_kl: 0}"],
        "--model.kl_reference.max_kl=0.0 must be a positive number",
        "write a value",
    ),
    _rollouts(
        VALUES,
        ["--model.kl_weight", "1", "--model.kl_reference", "{max_rollouts: null}"],
        "max_kl and max_rollouts are null",
        "set kl_reference to null",
    ),
    _rollouts(
        TOGETHER,
        ["--model.kl_gate", "{}"],
        "kl_gate changes the KL term, and kl_weight=0 turns it off",
        "write for example kl_weight=0.04",
    ),
    _rollouts(
        TOGETHER,
        ["--model.kl_reference", "{}"],
        "kl_reference changes the KL term, and kl_weight=0 turns it off",
        "set kl_reference to null",
    ),
    _rollouts(
        TOGETHER,
        ["--model.kl_per_time", "true"],
        "kl_per_time changes the KL term, and kl_weight=0 turns it off",
        "set kl_per_time to false",
    ),
    _rollouts(
        TOGETHER,
        ["--model.kl_weight", "1", "--model.kl_gate", "{}"],
        "kl_gate compares the trained reward with eval_rewards, and the module has none",
        "set kl_gate to null",
    ),
    _rollouts(
        TOGETHER,
        [
            "--model.kl_weight",
            "1",
            "--model.kl_gate",
            "{rewards: [red]}",
            "--model.eval_rewards",
            "{bright: Brightness}",
        ],
        "kl_gate.rewards contains red",
        "write some of bright",
    ),
    built(
        TOGETHER,
        "--model PolicyGradientModule --model.sampler.eta 1 --model.advantage_estimator DiversityAware",
        "DiversityAware compares samples of the same prompt, and samples_per_prompt=1",
        "set samples_per_prompt to 2 or more",
    ),
    built(TOGETHER, "--model.reward Offloaded --model.reward.reward Brightness", "Offloaded is not differentiable"),
    built(TOGETHER, "--conflict RewardConflict", "has only reward"),
    built(TOGETHER, "--trainer.callbacks EMAWeightAveraging", "copies the frozen weights", "write --ema AdapterEMA"),
    built(TOGETHER, "--trainer.callbacks BackboneFinetuning", "DraftModule does not have", "--model.model.trainable"),
    built(
        TOGETHER,
        ["--trainer.callbacks", "[{class_path: ModelPruning, init_args: {pruning_fn: l1_unstructured}}]"],
        "ModelPruning cannot be used",
        "write a smaller --model.model.lora.rank",
    ),
    built(
        TOGETHER, "--trainer.min_epochs 5 --trainer.max_epochs 2", "=5 must be at most", "write --trainer.min_epochs 2"
    ),
    built(
        TOGETHER,
        "--trainer.min_steps 5",
        "min_steps=5 must be at most --trainer.max_steps=2",
        "write --trainer.min_steps 2",
    ),
    built(TOGETHER, "--export LoRAExport", "LinearModel has no save_lora"),
    built(TOGETHER, "--guard OverOptimizationGuard", "LinearModel has no save_lora"),
    built(TOGETHER, "--trainer.precision bf16-true", "bf16"),
    built(TOGETHER, "--trainer.accelerator gpu", "gpu"),
    built(TOGETHER, "--trainer.accelerator tpu", "torch_xla"),
    built(TOGETHER, "--trainer.strategy fsdp", "fsdp"),
    built(TOGETHER, "--trainer.strategy deepspeed", "DeepSpeed"),
    built(TOGETHER, "--model.optimizer LBFGS", "LBFGS"),
    built(TOGETHER, "--trainer.gradient_clip_algorithm value", "no effect without", "--trainer.gradient_clip_val 1.0"),
    built(TOGETHER, ["--trainer.callbacks", "[ModelCheckpoint, ModelCheckpoint]"], "more than one", "ModelCheckpoint"),
    built(TOGETHER, "--trainer.callbacks lightning_draft.callbacks.LastCheckpoint", "more than one", "LastCheckpoint"),
    built(TOGETHER, "--trainer.gradient_clip_val 1.0 --trainer.gradient_clip_algorithm values", "values"),
    built(PLACES, "--trainer.default_root_dir file", "file", files={"file": "text"}),
    built(PLACES, "--trainer.default_root_dir /proc/nowhere", "/proc"),
    built(PLACES, f"--trainer.default_root_dir {'x' * 300}", "File name too long", "write a shorter name"),
    built(PLACES, f"--ckpt_path {'x' * 300}", "File name too long", "write a shorter name"),
    built(PLACES, f"--data.prompts {'x' * 300}.txt", "File name too long", "write a shorter name"),
    built(PLACES, "--trainer.default_root_dir ~no_such_user/x", "without a home folder", "write the whole path"),
    built(PLACES, "--ckpt_path ~no_such_user/x", "without a home folder", "write the whole path"),
    built(PLACES, "--export LoRAExport --export.push_to_hub ../x", "push_to_hub='../x' must be owner/name"),
    built(PLACES, "--name small", "runs", files={"runs": "text"}),
]
