"""A service for `HTTPReward`, with only the standard library. Replace `redness` by your own scoring function.

    python -m examples.judge_server --port 8000
    lightning-draft fit --config quickstart --model.eval_rewards.judge.class_path HTTPReward \
        --model.eval_rewards.judge.init_args.url http://127.0.0.1:8000
"""

import argparse
import base64
import io
import json
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from PIL import Image

Judge = Callable[[list[Image.Image], list[str], list[dict[str, Any]]], list[float]]


def redness(images: list[Image.Image], prompts: list[str], metadata: list[dict[str, Any]]) -> list[float]:
    """Mean red minus the mean of green and blue, in [-1, 1]."""
    means = [np.asarray(image.convert("RGB"), dtype=np.float64).mean((0, 1)) / 255 for image in images]
    return [float(red - (green + blue) / 2) for red, green, blue in means]


class Server(ThreadingHTTPServer):
    """Serve the protocol of `HTTPReward`: answer a request with a list of scores.

    The request is `{"images": [base64, ...], "prompts": [...], "metadata": [...]}`, the answer `{"scores": [...]}`.

    Args:
        judge: Scoring function; higher is better.
        port: Port on this machine; 0 chooses a free one (`server_port`).
    """

    daemon_threads = True

    def __init__(self, judge: Judge, port: int = 0) -> None:
        self.judge = judge
        super().__init__(("127.0.0.1", port), _Handler)


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        """Score one batch."""
        batch = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        images = [Image.open(io.BytesIO(base64.b64decode(image))) for image in batch["images"]]
        scores = self.server.judge(images, batch["prompts"], batch["metadata"])
        content = json.dumps({"scores": scores}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Do not log requests."""


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8000)
    with Server(redness, parser.parse_args().port) as server:
        print(f"listening on http://127.0.0.1:{server.server_port}", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
