"""A local server with the protocol of OpenAI's chat completions, whose answers are a function of the request."""

import base64
import io
import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from PIL import Image

Answer = Callable[[str, list[Image.Image]], Any]


class ChatServer(ThreadingHTTPServer):
    """Answer each request with the text, the alternatives or the status that a function returns.

    Args:
        answer: Called with the text and the images of a request. It returns a string, the text of the answer; a list
            of pairs of a token and a dictionary of log-probabilities; an integer, a status without a body; bytes, the
            whole body; or a float, seconds to wait without an answer.
    """

    daemon_threads = True

    def __init__(self, answer: Answer) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer = answer
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.times: list[float] = []
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()


class _Handler(BaseHTTPRequestHandler):
    server: ChatServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        parts = body["messages"][0]["content"]
        text = "".join(part["text"] for part in parts if part["type"] == "text")
        urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
        images = [Image.open(io.BytesIO(base64.b64decode(url.partition("base64,")[2]))) for url in urls]
        with self.server.lock:
            self.server.requests.append(body)
            self.server.headers.append(dict(self.headers))
            self.server.paths.append(self.path)
            self.server.times.append(time.monotonic())
            answer = self.server.answer(text, images)
        if isinstance(answer, float):
            time.sleep(answer)
            return
        self.send_response(answer if isinstance(answer, int) else 200)
        self.end_headers()
        if not isinstance(answer, int):
            self.wfile.write(answer if isinstance(answer, bytes) else completion(answer, len(images)))

    def log_message(self, *_: Any) -> None:
        pass


def completion(answer: str | list[tuple[str, dict[str, float]]], images: int = 1) -> bytes:
    """Return the body of a chat completion; it counts 100 input tokens for each image and 10 output tokens."""
    choice: dict[str, Any] = {"index": 0, "finish_reason": "stop"}
    if isinstance(answer, list):
        choice["logprobs"] = {
            "content": [
                {
                    "token": token,
                    "logprob": alternatives.get(token, -0.01),
                    "top_logprobs": [{"token": text, "logprob": value} for text, value in alternatives.items()],
                }
                for token, alternatives in answer
            ]
        }
        answer = "".join(token for token, _ in answer)
    choice["message"] = {"role": "assistant", "content": answer}
    usage = {"prompt_tokens": 100 * images, "completion_tokens": 10, "total_tokens": 100 * images + 10}
    fields = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1764230400, "model": "tiny-vlm"}
    return json.dumps({**fields, "choices": [choice], "usage": usage}).encode()


def gray(image: Image.Image) -> float:
    """Return the mean of an image in [0, 1]."""
    return float(np.asarray(image).mean()) / 255
