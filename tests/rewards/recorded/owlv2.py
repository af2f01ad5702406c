"""Record the output of the OWLv2 image processor of transformers 4, which resizes with scipy.

    pip install "torch>=2" "transformers>=4.57,<5" numpy pillow scipy
    python tests/rewards/recorded/owlv2.py tests/rewards/recorded/owlv2.json

Each list holds every fifth of the values, channel by channel and row by row.
"""

import json
import runpy
import sys
from pathlib import Path

SIZES = [(16, 16), (24, 40), (9, 14), (50, 33)]


def main(output: str) -> None:
    """Process every image."""
    from transformers import Owlv2ImageProcessor

    make_image = runpy.run_path(str(Path(__file__).parent / "image_reward.py"))["make_image"]
    processor = Owlv2ImageProcessor(size={"height": 16, "width": 16})
    values = {}
    for height, width in SIZES:
        found = processor(images=make_image(height, width, 0), return_tensors="np")["pixel_values"][0]
        values[f"{height}x{width}"] = [round(float(value), 5) for value in found.flatten()[::5]]
    Path(output).write_text(json.dumps(values) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
