"""Mistakes in code that the user wrote: the traceback is shown, and ends in that code."""

MINE = """
from lightning_draft.rewards import Reward
class Redness(Reward):
    def __init__(self, gain: float = 1.0):
        super().__init__()
        self.gain = gain
    def forward(self, images, prompts):
        return self.gain * images[:, 0].mean((1, 2))
class Abstract(Reward):
    pass
class BrokenConstructor(Reward):
    def __init__(self):
        super().__init__()
        self.table = {}["nothing"]
    def forward(self, images, prompts):
        return images.mean((1, 2, 3))
class BrokenForward(Reward):
    def forward(self, images, prompts):
        return images @ images[0, 0, 0, 0]
class WrongValue(Reward):
    def forward(self, images, prompts):
        return int("five") * images.mean((1, 2, 3))
class Stops(Reward):
    def forward(self, images, prompts):
        return next(iter([]))
class Exits(Reward):
    def forward(self, images, prompts):
        raise SystemExit(0)
class TakesNothing(Reward):
    def forward(self):
        return 1
class WithoutSuper(Reward):
    def __init__(self):
        self.gain = 1
    def forward(self, images, prompts):
        return images.mean((1, 2, 3))
"""

YOUR_CODE = {
    "mine.BrokenConstructor": ("KeyError: 'nothing'", 'self.table = {}["nothing"]'),
    "mine.BrokenForward": ("RuntimeError", "images @ images[0, 0, 0, 0]"),
    "mine.WrongValue": ("ValueError: invalid literal for int", 'int("five")'),
    "mine.Stops": ("StopIteration", "next(iter([]))"),
    "mine.TakesNothing": (
        "TypeError: TakesNothing.forward() takes 1 positional argument but 3 were given",
        "forward_call",
    ),
    "broken.Redness": ("SyntaxError", "def f(:"),
    "imports.Redness": ("ModuleNotFoundError: No module named 'nowhere_at_all'", "import nowhere_at_all"),
}
"""By reward: the exception, and the line of code that the traceback must end in."""

FILES = {"mine.py": MINE, "broken.py": "def f(:\n", "imports.py": "import nowhere_at_all\n"}
