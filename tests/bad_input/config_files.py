"""Config files whose content cannot be used."""

from tests.bad_input.cases import Case, edited

CONFIGS = "Config files"

CASES: list[Case] = [
    edited(CONFIGS, "trainer:", "trainr:", "--trainr", "did you mean trainer"),
    edited(CONFIGS, "max_steps: 2", "max_step: 2", "--trainer.max_step: Trainer", "did you mean max_steps"),
    edited(CONFIGS, "init_args: {k: 2}", "init_args: {kk: 2}", "--model.truncation.kk: LastK", "did you mean k"),
    edited(
        CONFIGS, "      init_args: {k: 2}", "      k: 2", "--model.truncation", "class_path: one of", "under init_args"
    ),
    edited(CONFIGS, "max_steps: 2", "max_steps: ${data.batch}", "small.yaml", "data.batch"),
    edited(CONFIGS, "max_steps: 2", "max_steps: [", "small.yaml, line", "not YAML"),
    edited(
        CONFIGS,
        "class_path: Brightness\n      init_args: {target: 0.9}",
        "{}",
        "--model.reward",
        "class_path: ",
        "Brightness",
    ),
    edited(
        CONFIGS, "pretrained: ", "pretraned: ", "--model.model.pretraned: StableDiffusion", "did you mean pretrained"
    ),
    edited(CONFIGS, "prompts: [", "promts: [", "--data.promts: PromptDataModule", "did you mean prompts"),
    edited(CONFIGS, "model:\n  class_path", "model:\n  class_pth", "--model", "class_path"),
    edited(CONFIGS, "{k: 2}", "{k: two}", "--model.truncation.k", "an integer", "'two'"),
    edited(CONFIGS, "{k: 2}", "{k: [2]}", "--model.truncation.k", "an integer"),
    edited(CONFIGS, "max_steps: 2", "max_steps: 1e3", "--trainer.max_steps", "an integer"),
    edited(CONFIGS, "max_steps: 2", "max_steps: ${oc.env:NOWHERE_AT_ALL}", "small.yaml", "NOWHERE_AT_ALL"),
    edited(CONFIGS, "max_steps: 2", "max_steps: ${trainer.max_steps}", "small.yaml"),
    edited(
        CONFIGS, "batch_size: 2", "batch_size: 2\n  batch_size: 4", "small.yaml, line 20", "duplicate key batch_size"
    ),
    edited(CONFIGS, "prompts: [a cat, a red cat, red, a bed, a cab, bread, a deer]", "prompts: [a cat, 3]", "prompts"),
    edited(CONFIGS, "prompts: [a cat, a red cat, red, a bed, a cab, bread, a deer]", "prompts: {a: b}", "prompts"),
    edited(CONFIGS, "data:\n", "data:\n  class_path: PromptDataModule\n", "--data"),
    edited(
        CONFIGS,
        "trainer:\n",
        "trainer:\n  logger: {class_path: CSVLogger, init_args: {savedir: x}}\n",
        "savedir",
        "did you mean save_dir",
    ),
    edited(CONFIGS, "data:\n", "data: [a cat]\nold:\n", "--old"),
    edited(CONFIGS, "trainer:\n", "trainer: 3\nold:\n", "--"),
]
