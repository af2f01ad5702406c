"""Whole command lines."""

from pathlib import Path

from tests.bad_input.cases import Case, command

COMMANDS = "Commands"
CONFIGS = "Config files"


def _deep(path: Path) -> None:
    path.write_text("[" * 1200)


def _bomb(path: Path) -> None:
    lines = ["a0: &a0 [x, x]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    path.write_text("\n".join(lines))


def _reward(name: str) -> str:
    return f"{name}: {{class_path: Brightness}}\n"


CASES: list[Case] = [
    command(CONFIGS, "fit --config quikstart", "did you mean quickstart"),
    command(COMMANDS, "fit --conifg quickstart", "there is no option --conifg; did you mean --config"),
    command(CONFIGS, "fit quickstart", "write lightning-draft fit --config quickstart"),
    command(COMMANDS, "fit --modle.seed 5", "there is no option --modle.seed; did you mean --model.seed"),
    command(COMMANDS, "fit --sample.every_n_steps 5", "did you mean --samples.every_n_steps"),
    command(CONFIGS, "fit --config nowhere.yaml", "there is no config file nowhere.yaml"),
    command(CONFIGS, "fit --config .", "a folder without a config.yaml"),
    command(CONFIGS, ["fit", "--config", "x" * 300], "is not a config"),
    command(CONFIGS, "fit --config list.yaml", "list.yaml must be a mapping", files={"list.yaml": "- a\n"}),
    command(CONFIGS, "fit --config binary.yaml", "binary.yaml is not YAML", files={"binary.yaml": b"\xff\xfe\x00"}),
    command(CONFIGS, "fit --config deep.yaml", "deep.yaml is not YAML", files={"deep.yaml": _deep}),
    command(CONFIGS, "fit --config", "--config needs a config"),
    command(COMMANDS, "fti", "did you mean fit"),
    command(COMMANDS, "train", "train with `lightning-draft fit`"),
    command(COMMANDS, "test", "score held-out prompts with `lightning-draft validate`"),
    command(COMMANDS, "predict", "generate images with `lightning-draft sample`"),
    command(COMMANDS, "configs show draft_kk", "did you mean draft_k"),
    command(COMMANDS, "configs shw", "write `configs list`"),
    command(COMMANDS, "sample", "give a LoRA file"),
    command(COMMANDS, "sample nowhere.safetensors", "there is no LoRA file nowhere.safetensors"),
    command(
        COMMANDS, "sample list.yaml", "list.yaml is damaged or not a safetensors file", files={"list.yaml": "- a\n"}
    ),
    command(COMMANDS, "sample .", "has no LoRA file"),
    command(COMMANDS, "sample x.safetensors --scales 1", "there is no option --scales; did you mean --scale; see"),
    command(COMMANDS, "sample x.safetensors --scale nan", "must contain finite numbers"),
    command(COMMANDS, "sample x.safetensors --scale big", "--scale", "'big' must contain finite numbers", "0 0.5 1"),
    command(COMMANDS, "sample x.safetensors --steps many", "--steps", "'many' must be an integer"),
    command(COMMANDS, "sample x.safetensors --max 0", "0 must be at least 1"),
    command(COMMANDS, "sample x.safetensors --steps -1", "-1 must be at least 1"),
    command(COMMANDS, "sample x.safetensors --output x.foo", "x.foo is not an image file"),
    command(COMMANDS, "sample x.safetensors --device nowhere", "nowhere is not available"),
    command(COMMANDS, "guide", "give a LoRA file", "--config", "--model"),
    command(COMMANDS, "guide --method best_of_m", "--method", "'best_of_m'", "did you mean best_of_n"),
    command(COMMANDS, "guide --method reno:0", "--method reno:0", "at least 1", "write reno:10"),
    command(COMMANDS, "Fit --config quickstart", "'Fit'", "did you mean fit"),
    command(COMMANDS, "fit", "there is no config", "--config quickstart"),
    command(COMMANDS, "--config quickstart", "'--config'", "lightning-draft --help"),
    command(COMMANDS, ["fit --config quickstart"], "there is no command"),
    command(COMMANDS, "fit --config quickstart --config", "--config needs a config"),
    command(COMMANDS, "validate --config nowhere", "there is no config 'nowhere'"),
    command(COMMANDS, ["a\x1b[31mb"], "\\x1b[31mb"),
    command(COMMANDS, ["fit", "--config", "a\x00b"], "a\\x00b"),
    command(COMMANDS, "configs show", "write `configs list` or `configs show NAME`"),
    command(COMMANDS, "configs show a b", "write `configs list` or `configs show NAME`"),
    command(COMMANDS, "score", "score"),
    command(COMMANDS, "score nowhere --reward Brightness", "nowhere"),
    command(COMMANDS, "score . --reward Brightness", "no images"),
    command(COMMANDS, "score . --reward Brightnes", "Brightnes"),
    command(COMMANDS, "score .", "--reward"),
    command(COMMANDS, "score . --reward Brightness --batch_size 0", "batch_size"),
    command(COMMANDS, "score . --reward Brightness --batch_size two", "two"),
    command(COMMANDS, "score . --reward VLMJudge", "endpoint"),
    command(COMMANDS, "score . . --reward Brightness --pairwise", "--pairwise compares two folders", "VLMJudge"),
    command(COMMANDS, "vote", "FOLDER", "lightning-draft vote --help"),
    command(COMMANDS, "vote nowhere", "there is no folder 'nowhere'"),
    command(COMMANDS, "vote . --port 99999", "--port=99999 must be between 0 and 65535"),
    command(COMMANDS, "sample x.safetensors --seed abc", "abc"),
    command(COMMANDS, "sample x.safetensors --seed -1", "--seed", "-1", "write 0"),
    command(COMMANDS, f"sample x.safetensors --seed {2**70}", "--seed", "between 0 and 2^63 - 1", "write 0"),
    command(COMMANDS, "sample x.safetensors --device meta", "meta is not available"),
    command(COMMANDS, f"lora info {'x' * 300}", "File name too long", "write a shorter name"),
    command(COMMANDS, "lora convert x.safetensors -o y.safetensors --grid y.png", '--prompt "a cat"'),
    command(COMMANDS, "lora convert x.safetensors -o y.safetensors --reward Brightness", '--prompt "a cat"'),
    command(COMMANDS, "score . --rewards r.yaml", "'a/b' cannot be the name", files={"r.yaml": _reward("a/b")}),
    command(
        COMMANDS,
        "score . --rewards twice.yaml",
        "twice.yaml",
        "duplicate key a",
        files={"twice.yaml": _reward("a") * 2},
    ),
    command(COMMANDS, "sample x.safetensors --prompts nowhere.txt --model emoji64", "x.safetensors"),
    command(COMMANDS, "sample x.safetensors --config quickstart --model emoji64", "x.safetensors"),
    command(CONFIGS, "fit --config empty.yaml", "empty.yaml must be a mapping", files={"empty.yaml": ""}),
    command(
        CONFIGS, "fit --config tabs.yaml", "tabs.yaml, line 2 is not YAML", files={"tabs.yaml": "model:\n\tx: 1\n"}
    ),
    command(CONFIGS, "fit --config two.yaml", "two.yaml", "not YAML", files={"two.yaml": "a: 1\n---\nb: 2\n"}),
    command(
        CONFIGS,
        "fit --config code.yaml",
        "code.yaml",
        "not YAML",
        "python/object/apply:os.system",
        files={"code.yaml": "model: !!python/object/apply:os.system [touch hacked]\n"},
    ),
    command(
        CONFIGS,
        "fit --config name.yaml",
        "name.yaml",
        "not YAML",
        "python/name",
        files={"name.yaml": "model: !!python/name:os.system\n"},
    ),
    command(
        CONFIGS,
        "fit --config twice.yaml",
        "twice.yaml, line 3",
        "duplicate key trainer",
        files={"twice.yaml": "trainer: {max_steps: 1}\ndata: {prompts: animals}\ntrainer: {max_steps: 2}\n"},
    ),
    command(
        CONFIGS,
        "fit --config cycle.yaml",
        "cycle.yaml",
        files={"cycle.yaml": "model: &a\n  class_path: DraftModule\n  init_args: *a\n"},
    ),
    command(
        CONFIGS,
        "fit --config anchor.yaml",
        "anchor.yaml",
        "undefined alias",
        files={"anchor.yaml": "model: *nowhere\n"},
    ),
    command(CONFIGS, "fit --config zip.yaml", "zip.yaml is not YAML", files={"zip.yaml": b"PK\x03\x04\xff\xfe\x00"}),
    command(CONFIGS, "fit --config utf16.yaml", "utf16.yaml", files={"utf16.yaml": "model: a".encode("utf-16")}),
    command(CONFIGS, "fit --config number.yaml", "number.yaml", files={"number.yaml": "1: 2\n"}),
    command(CONFIGS, "fit --config config.json", "config.json", files={"config.json": "{"}),
    command(CONFIGS, "fit --config bomb.yaml", "bomb.yaml", files={"bomb.yaml": _bomb}),
    command(
        CONFIGS,
        "fit --config model_is_text.yaml",
        "--model",
        files={"model_is_text.yaml": "model: a cat\ndata: {prompts: animals}\n"},
    ),
]
