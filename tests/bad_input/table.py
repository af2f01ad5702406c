"""All rows of the table of invalid input."""

from tests.bad_input import commands, config_files, models, options, prompts, rewards, runs, values
from tests.bad_input.cases import Case

CASES: list[Case] = [
    case
    for module in (commands, config_files, options, values, prompts, rewards, models, runs)
    for case in module.CASES
]
