"""Votes: the page, its security, the files, fitted scores, and a training run that waits for votes."""

import csv
import http.client
import io
import os
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
import torch
from PIL import Image

from lightning_draft.cli.vote import build_server, parser
from lightning_draft.errors import ConfigurationError
from lightning_draft.objectives import PPO, PRDP
from lightning_draft.preferences import BradleyTerry, WinRate
from lightning_draft.rewards import HumanVotes, RewardServiceError
from lightning_draft.rewards.blackbox import to_pil
from lightning_draft.samplers import DDIM
from lightning_draft.score_table import ScoreTable
from lightning_draft.testing import LinearModel
from lightning_draft.vote_pairs import pairs_of_folders
from lightning_draft.vote_server import VoteServer
from lightning_draft.votes import Pair, VoteFolder, fit_votes, image_key
from tests.rewards.chat_server import gray
from tests.tiny_policy_gradients import MILD, fit, linear

PROMPT = '<b>"a & b"</b>'


def write(folder: Path, levels: dict[str, int]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, level in levels.items():
        Image.new("RGB", (6, 4), (level,) * 3).save(folder / name)
        (folder / name).with_suffix(".txt").write_text(PROMPT)
    return folder


class Browser:
    """Requests to the page, with the headers of a browser."""

    def __init__(self, server: VoteServer) -> None:
        self.host = f"127.0.0.1:{server.server_port}"

    def send(self, method: str, path: str, body: str = "", **headers: str) -> tuple[int, bytes, dict[str, str]]:
        connection = http.client.HTTPConnection(self.host, timeout=5)
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        for name, value in {"Host": self.host, "Content-Length": str(len(body)), **headers}.items():
            connection.putheader(name, value)
        connection.endheaders(body.encode())
        answer = connection.getresponse()
        result = answer.status, answer.read(), dict(answer.getheaders())
        connection.close()
        return result

    def form(self, path: str = "/") -> dict[str, str]:
        """Return the hidden fields of the form on the page."""
        page = self.send("GET", path)[1].decode()
        return dict(re.findall(r'<input type="hidden" name="(\w+)" value="([^"]*)">', page))

    def vote(self, winner: str, form: dict[str, str] | None = None, **headers: str) -> int:
        form = {**(self.form() if form is None else form), "winner": winner}
        return self.send("POST", "/vote", urlencode(form), **{"Origin": f"http://{self.host}", **headers})[0]


def start(server: VoteServer) -> Browser:
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    return Browser(server)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[VoteServer]:
    folders = [write(tmp_path / "base", {"1.png": 10, "2.png": 20}), write(tmp_path / "tuned", {"1.png": 30})]
    with build_server(parser().parse_args([*map(str, folders), "--port", "0"])) as built:
        start(built)
        yield built
        built.shutdown()


def test_votes_are_appended_until_every_pair_has_one(server: VoteServer, tmp_path: Path) -> None:
    browser = Browser(server)
    status, page, headers = browser.send("GET", "/")
    assert status == 200
    assert "&lt;b&gt;&quot;a &amp; b&quot;&lt;/b&gt;" in page.decode()
    assert "<b>" not in page.decode()
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    first = browser.form()
    for key in re.findall(r"/image/([0-9a-f]{32})", page.decode()):
        status, content, headers = browser.send("GET", f"/image/{key}")
        assert (status, headers["Content-Type"], content[:4]) == (200, "image/png", b"\x89PNG")
    assert browser.vote("first") == 303
    assert browser.form() != first
    assert browser.vote("tie") == 303
    assert b"All 2 pairs have a vote" in browser.send("GET", "/")[1]
    with (tmp_path / "base" / "votes.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["winner"], row["prompt"]) for row in rows] == [("first", PROMPT), ("tie", PROMPT)]
    assert Pair(rows[0]["first"], rows[0]["second"], PROMPT).key == first["pair"]
    assert browser.vote("second", browser.form(f"/?pair={first['pair']}")) == 303
    assert sorted(preference for _, preference in server.folder.votes().values()) == [0.0, 0.5]


def test_votes_of_other_sites_are_rejected(server: VoteServer) -> None:
    browser = Browser(server)
    form = browser.form()
    assert browser.vote("first", form, Origin="http://evil.example") == 403
    assert browser.vote("first", form, Origin="null") == 403
    assert browser.vote("first", {**form, "token": "guess"}) == 403
    assert browser.vote("first", {**form, "token": "é"}) == 403
    assert browser.vote("first", form, Host="evil.example:80", Origin="http://evil.example:80") == 403
    assert browser.send("GET", "/", Host="evil.example:80")[0] == 403
    assert browser.vote("first", {**form, "pair": "0" * 32}) == 400
    assert browser.vote("everyone", form) == 400
    assert browser.send("POST", "/vote", "x" * 5000, Origin=f"http://{browser.host}")[0] == 400
    assert server.folder.votes() == {}
    assert browser.vote("first", form) == 303


@pytest.mark.parametrize(
    "path",
    ["/image/../votes.csv", "/image/..%2f..%2fsecret.png", "/image/", "/etc/passwd", "//127.0.0.1/x", "/image/1.png"],
)
def test_no_other_file_is_served(server: VoteServer, tmp_path: Path, path: str) -> None:
    (tmp_path / "secret.png").write_bytes(b"secret")
    status, content, _ = Browser(server).send("GET", path)
    assert (status, b"secret" in content) == (404, False)


def test_formats_that_browsers_do_not_show_are_converted(tmp_path: Path) -> None:
    image = Image.new("RGB", (6, 4), (1, 2, 3))
    image.save(tmp_path / "cat_1.tif")
    with VoteServer(VoteFolder(tmp_path), [], {"a" * 32: tmp_path / "cat_1.tif"}) as built:
        status, content, headers = start(built).send("GET", f"/image/{'a' * 32}")
        built.shutdown()
    assert (status, headers["Content-Type"]) == (200, "image/png")
    assert image_key(Image.open(io.BytesIO(content))) == image_key(image)


def test_a_damaged_pairs_file_gives_no_path(tmp_path: Path) -> None:
    folder = VoteFolder(tmp_path / "votes")
    folder.request([Pair("a" * 32, "b" * 32, "x")], {})
    with folder.pairs_file.open("a") as file:
        file.write(f"../../secret,{'b' * 32},x\n")
    assert folder.pairs() == [Pair("a" * 32, "b" * 32, "x")]


def test_equal_images_of_two_prompts_are_two_pairs(tmp_path: Path) -> None:
    pairs = [Pair("a" * 32, "b" * 32, prompt) for prompt in ("a cat", "a dog")]
    with VoteServer(VoteFolder(tmp_path), pairs) as built:
        browser = start(built)
        assert [browser.vote("first"), browser.vote("second")] == [303, 303]
        built.shutdown()
        assert built.folder.votes() == {pairs[0].id: (pairs[0], 1.0), pairs[1].id: (pairs[1], 0.0)}


def test_a_vote_that_cannot_be_written_is_an_error_on_the_page(server: VoteServer, capfd: Any) -> None:
    browser = Browser(server)
    form = browser.form()
    server.folder.votes_file.mkdir()
    status, content, _ = browser.send("GET", "/")
    assert (status, b"votes.csv" in content) == (500, True)
    assert browser.vote("first", form) == 500
    assert capfd.readouterr().err == ""


def test_a_closed_connection_prints_no_traceback(server: VoteServer, capfd: Any) -> None:
    client = socket.create_connection(server.server_address[:2])
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close with a reset
    client.sendall(b"GET /")
    client.close()
    Browser(server).form()
    time.sleep(0.05)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("line", ["a" * 200_000, "a\rb,c", '"'])
def test_damaged_lines_are_ignored(tmp_path: Path, line: str) -> None:
    folder, pair = VoteFolder(tmp_path), Pair("a" * 32, "b" * 32, "x")
    (tmp_path / "votes.csv").write_text(line + "\n")
    folder.add_vote(pair, "first")
    assert folder.votes() == {pair.id: (pair, 1.0)}


def test_the_server_listens_on_the_loopback_address(server: VoteServer) -> None:
    assert server.server_address[0] == "127.0.0.1"


def test_incomplete_lines_are_ignored_and_do_not_damage_the_next_vote(tmp_path: Path) -> None:
    folder, pair, other = VoteFolder(tmp_path), Pair("a" * 32, "b" * 32, "x, y"), Pair("a" * 32, "c" * 32, "x, y")
    folder.add_vote(pair, "first")
    os.truncate(folder.votes_file, folder.votes_file.stat().st_size - 30)  # within the quoted prompt
    assert folder.votes() == {}
    folder.add_vote(other, "second")
    assert folder.votes() == {other.id: (other, 0.0)}


def test_pairs_are_of_one_prompt_and_of_different_folders(tmp_path: Path) -> None:
    one, two = write(tmp_path / "a", {"1.png": 1, "2.png": 2}), write(tmp_path / "b", {"1.png": 1, "3.png": 3})
    assert len(pairs_of_folders([one])[0]) == 1
    pairs, files = pairs_of_folders([one, two])
    keys = {level: image_key(Image.new("RGB", (6, 4), (level,) * 3)) for level in (1, 2, 3)}
    assert {pair.id[0] for pair in pairs} == {
        frozenset((keys[1], keys[3])),
        frozenset((keys[2], keys[1])),
        frozenset((keys[2], keys[3])),
    }
    assert files[keys[3]] == two / "3.png"
    (one / "2.txt").write_text("another prompt")
    with pytest.raises(ConfigurationError, match="there are no two different images of the same prompt"):
        pairs_of_folders([one])


def test_scores_of_existing_images_are_fitted_to_the_votes(tmp_path: Path) -> None:
    images = torch.tensor([0.1, 0.5, 0.9, 0.3]).view(4, 1, 1, 1).expand(4, 3, 4, 4)
    keys = [image_key(image) for image in to_pil(images)]
    folder = VoteFolder(tmp_path)
    folder.add_vote(Pair(keys[0], keys[1], "a"), "second")
    folder.add_vote(Pair(keys[2], keys[1], "a"), "first")
    folder.add_vote(Pair(keys[0], keys[2], "b"), "first")
    scores = HumanVotes(str(tmp_path))(images, ["a", "a", "a", "a"])
    wins = torch.tensor([[[0, 0, 0], [1, 0, 0], [0, 1, 0.0]]])
    torch.testing.assert_close(scores[:3], BradleyTerry().from_preferences(wins).float())
    assert scores[3] == 0
    assert fit_votes(folder.votes(), 1.0)["b", keys[0]] > 0


def test_scores_of_fewer_votes_are_not_continued(tmp_path: Path) -> None:
    reward = HumanVotes(str(tmp_path / "votes"))
    table = ScoreTable(tmp_path, tmp_path, {"people": reward})
    table.replace([])
    ScoreTable(tmp_path, tmp_path, {"people": reward})
    VoteFolder(reward.folder).add_vote(Pair("a" * 32, "b" * 32, "a"), "first")
    with pytest.raises(ConfigurationError, match="scores of other rewards, settings or votes"):
        ScoreTable(tmp_path, tmp_path, {"people": reward})


class Voter(threading.Thread):
    """Open the page of a folder and vote for the brighter image of every pair, until stopped."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self.server = VoteServer(VoteFolder(folder))
        self.browser = start(self.server)
        self.stopped = threading.Event()
        self.votes = 0

    def run(self) -> None:
        while not self.stopped.wait(0.01):
            form = self.browser.form()
            if not form:
                continue
            pair = self.server.find(form["pair"])
            images = [Image.open(self.server.folder.image(key)) for key in (pair.first, pair.second)]
            assert self.browser.vote("first" if gray(images[0]) > gray(images[1]) else "second", form) == 303
            self.votes += 1

    def stop(self) -> None:
        self.stopped.set()
        self.join(5)
        self.server.shutdown()
        self.server.server_close()


def module_of(folder: Path, **options: Any) -> Any:
    return linear(
        model=LinearModel(0.1, schedule=MILD),
        sampler=DDIM(3, eta=1.0),
        reward=HumanVotes(str(folder), time_limit=30),
        samples_per_prompt=3,
        **options,
    )


@pytest.mark.parametrize(("objective", "estimator"), [(PPO(clip=1e-2), WinRate()), (PRDP(), BradleyTerry())])
def test_training_waits_for_votes_and_uses_them(tmp_path: Path, objective: Any, estimator: Any) -> None:
    folder = tmp_path / "votes"
    voter = Voter(folder)
    voter.start()
    module = module_of(folder, objective=objective, advantage_estimator=estimator)
    fit(tmp_path, module, steps=1)
    voter.stop()
    rollout = module.buffer.rollout
    levels = torch.tensor([gray(image) for image in to_pil(rollout.latents[-1])])
    torch.testing.assert_close(rollout.advantages, estimator(levels, (), 3))
    assert voter.votes == len(levels)  # 3 pairs for 3 images of each prompt
    again = module_of(folder, objective=objective, advantage_estimator=estimator)
    fit(tmp_path, again, steps=1)  # nobody votes now: the same images have votes
    torch.testing.assert_close(again.buffer.rollout.advantages, rollout.advantages)


def test_missing_votes_end_the_run_after_the_time_limit(tmp_path: Path) -> None:
    images = [Image.new("RGB", (4, 4), (level,) * 3) for level in (1, 2, 3)]
    reward = HumanVotes(str(tmp_path / "votes"), time_limit=0.2)
    start_time = time.monotonic()
    with pytest.raises(RewardServiceError, match="2 of 2 pairs have no vote after time_limit=0.2 s; vote with"):
        reward.prefer(images[:2], images[1:], ["a", "a"])
    assert time.monotonic() - start_time < 2
    folder = VoteFolder(tmp_path / "votes")
    newest = folder.pairs()[0]
    assert (newest.first, newest.second) == (image_key(images[1]), image_key(images[2]))
    for pair in folder.pairs():
        folder.add_vote(Pair(pair.second, pair.first, pair.prompt), "first")
    assert reward.prefer(images[:2], images[1:], ["a", "a"]).tolist() == [0.0, 0.0]
    assert reward.prefer(images[:1], images[:1], ["a"]).tolist() == [0.5]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "there is no folder 'nowhere'"),
        (["a", "--port", "70000"], "--port=70000 must be between 0 and 65535"),
    ],
)
def test_invalid_arguments_are_rejected(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        build_server(parser().parse_args(arguments))


def test_a_port_in_use_is_named(tmp_path: Path, server: VoteServer) -> None:
    folder = write(tmp_path / "more", {"1.png": 1, "2.png": 2})
    with pytest.raises(ConfigurationError, match=f"--port {server.server_port} cannot be used: Address already in use"):
        build_server(parser().parse_args([str(folder), "--port", str(server.server_port)]))
