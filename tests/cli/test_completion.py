"""Tab completion: bash completes commands, configs and options with the script."""

import shutil
import subprocess
from collections.abc import Callable

import pytest

from lightning_draft.cli import shipped
from lightning_draft.cli.completion import script


@pytest.fixture(scope="module")
def bash_script() -> str:
    return script("bash")


def complete(bash_script: str, *words: str) -> list[str]:
    """Return bash's completions for the last of `words`."""
    line = f"COMP_WORDS=({' '.join(map(repr, words))}); COMP_CWORD={len(words) - 1}; _lightning_draft"
    program = f'{bash_script}\n{line}\nprintf "%s\\n" "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "--norc", "-c", program], capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["lightning-draft", "va"], ["validate"]),
        (["lightning-draft", "fit", "--config", "quick"], ["quickstart"]),
        (["lightning-draft", "fit", "--config", ""], shipped.names()),
        (["lightning-draft", "configs", "show", "guard"], ["guard"]),
        (["lightning-draft", "fit", "--trainer.max"], ["--trainer.max_steps"]),
        (["lightning-draft", "fit", "--model.truncation.k"], ["--model.truncation.k"]),
        (["lightning-draft", "fit", "--model.model.lora.rank"], ["--model.model.lora.rank"]),
        (["lightning-draft", "sample", "--sca"], ["--scale"]),
        (["lightning-draft", "score", "runs"], []),
    ],
)
def test_bash_completes_commands_configs_and_options(words: list[str], expected: list[str], bash_script: str) -> None:
    assert complete(bash_script, *words) == expected


def test_command_prints_the_script(command: Callable, bash_script: str) -> None:
    assert command("completion", "bash").out == bash_script
    assert script("zsh").endswith(bash_script)
    assert command("completion").status == 2
    assert "completion='fish'" in command("completion", "fish").err
    assert "init_args" not in bash_script
    assert "class_path" not in bash_script
