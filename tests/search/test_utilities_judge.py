"""The judge, against an endpoint of our own."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from token_swarm.decoding.request import DecodeRequest
from token_swarm.errors import BadParameter
from token_swarm.particle import Mixture
from token_swarm.search.data import PromptExample
from token_swarm.search.utilities import Generations, Judge, JudgeClient, JudgeSettings
from token_swarm.search.utilities.judge_reply import parse_score
from token_swarm.search.utility import UtilityUnavailable


class Endpoint:
    """Answers chat completions from a list: a text, an HTTP status, or raw bytes; the last one for ever."""

    def __init__(self) -> None:
        self.replies: list[str | int | bytes] = ["Score: 7"]
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                endpoint.requests.append({"path": self.path, **json.loads(body)})
                endpoint.headers.append(dict(self.headers.items()))
                reply = endpoint.replies.pop(0) if len(endpoint.replies) > 1 else endpoint.replies[0]
                status = reply if isinstance(reply, int) else 200
                if isinstance(reply, str):
                    usage = {"prompt_tokens": 100, "completion_tokens": 10}
                    reply = json.dumps({"choices": [{"message": {"content": reply}}], "usage": usage}).encode()
                self.send_response(status)
                self.end_headers()
                self.wfile.write(reply if isinstance(reply, bytes) else b"try later")

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    endpoint = Endpoint()
    yield endpoint
    endpoint.close()


def client(endpoint: Endpoint, folder: Path | None = None, **settings: Any) -> tuple[JudgeClient, list[float]]:
    slept: list[float] = []
    return JudgeClient(JudgeSettings(endpoint.url, "m", **settings), folder, sleep=slept.append), slept


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("Score: 7", 7),
        ("score = **10**", 10),
        ("The score of 3 is too low. Score: 8", 8),
        ("9", 9),
        (" 4/10.\n", 4),
        ("Score: 0", None),
        ("Score: 11", None),
        ("Score: 7.5", None),
        ("I give it seven.", None),
        ("It answers 3 of 5 questions", None),
        ("", None),
        ("Rating: [[7]]", 7),
        ("[[7]]", 7),
        ("Rating: [[7/10]]", 7),
        ("Score: 7/10", 7),
        ("**7**", 7),
        ("7 out of 10", 7),
        ("I'd give this a 7.", 7),
        ("I’d give this a 7", 7),
        ("I would rate this answer an 8 out of 10.", 8),
        ("I rate it 6/10", 6),
        ("Score: **7**", 7),
        ("**Score:** 7", 7),
        ("**Score**: 7", 7),
        ("**Score: 7**", 7),
        ("**Score: 7/10**", 7),
        ("## Rating\n\n**7**", 7),
        ("Overall rating: 9/10. In 2024 things changed.", 9),
        ("My rating is 4", 4),
        ("The answer deserves a 3.", 3),
        ("Score - 7", 7),
        ("Score: 7/100", None),
        ("Score: 85", None),
        ("Rating: 4/5", None),
        ("4/5", None),
        ("In 2024 the model said 5 things.", None),
        ("In 2024, I'd say it is good. There are 3 errors.", None),
        ("It lists 10 items and 7 are right.", None),
        ("The score", None),
        ("<think>maybe Score: 3</think>Score: 8", 8),
        ("<think>maybe 3", None),
        ("8\n\nThe answer is clear. It names 2 facts.", 8),
        ("The answer is clear. It names 2 facts.\n\n8", 8),
        ("Score: -3", None),
        ("100%", None),
        ("Score: 10.", 10),
        ("Score: 10/10", 10),
        ("7.", 7),
        ("`7`", 7),
        ('{"score": 7}', 7),
        ('{"rating": "8"}', 8),
        ("1. It is good.\n2. It is short.", None),
        ("Score:\n7", 7),
        ("Score (1-10): 7", 7),
        ("Score out of 10: 7", 7),
        ("Grade: 5", 5),
        ("Final score is 6", 6),
        ("I'd score it 7", 7),
        ("2024", None),
        ("Score: 2024", None),
        ("The 2023 score of 50 is", None),
        ("Rated 7/10 on 3/10/2024", 7),
        ("10/10/2024", None),
        ("3/10/2024", None),
        ("Rating: 7 stars", 7),
        ("It gets 3 facts right. Rating: 5", 5),
        ("It gets 3 facts right.", None),
        ("It gets 3 of 5 right", None),
        ("I give it 7 points", 7),
        ("On a scale of 1 to 10, I'd give it a 6.", 6),
        ("On a scale from 1 to 10: 6", 6),
        ("The answer is about 9 planets.", None),
        ("Score: seven", None),
        ("Score: 8 - good", 8),
        ("Score 8", 8),
    ],
)
def test_the_score_of_a_reply_is_found_and_no_other_number(reply: str, score: int | None) -> None:
    assert parse_score(reply) == score


def test_the_judge_sees_question_answer_and_reference(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("JUDGE_KEY", "sesame")
    judge, slept = client(endpoint, key_variable="JUDGE_KEY", prompt_price=2.0, completion_price=5.0)
    assert judge.score("2+2?", "It is 4", "4") == 7
    (request,) = endpoint.requests
    assert request["path"] == "/v1/chat/completions"
    assert (request["model"], request["temperature"]) == ("m", 0)
    assert (
        request["messages"][1]["content"]
        == "[Question]\n2+2?\n\n[A good answer]\n4\n\n[The assistant's answer]\nIt is 4"
    )
    assert endpoint.headers[0]["Authorization"] == "Bearer sesame"
    assert (judge.usage.requests, judge.usage.retries, slept) == (1, 0, [])
    assert (judge.usage.prompt_tokens, judge.usage.completion_tokens) == (100, 10)
    assert judge.usage.cost == pytest.approx(250e-6)


def test_an_answer_is_asked_for_once(endpoint: Endpoint, tmp_path: Path) -> None:
    judge, _ = client(endpoint, tmp_path)
    assert [judge.score("q", "a"), judge.score("q", "a"), client(endpoint, tmp_path)[0].score("q", "a")] == [7, 7, 7]
    assert len(endpoint.requests) == 1
    judge.score("q", "b")
    judge.score("q", "a", "reference")
    assert len(endpoint.requests) == 3


@pytest.mark.parametrize("failure", [429, 503, b"<html>", b'{"choices": []}', b'{"error": "x"}'])
def test_a_failure_is_tried_again(endpoint: Endpoint, failure: int | bytes) -> None:
    endpoint.replies = [failure, failure, "Score: 6"]
    judge, slept = client(endpoint)
    assert judge.score("q", "a") == 6
    assert slept == [1.0, 2.0]
    assert (judge.usage.requests, judge.usage.retries) == (3, 2)


def test_a_judge_that_is_down_is_named_after_the_retries(endpoint: Endpoint) -> None:
    endpoint.replies = [503]
    judge, slept = client(endpoint, retries=2)
    with pytest.raises(UtilityUnavailable, match=r"/v1/chat/completions does not answer after 3 attempts: HTTP 503"):
        judge.score("q", "a")
    assert len(slept) == 2
    nobody = JudgeClient(JudgeSettings("http://127.0.0.1:9/v1", "m", retries=1), sleep=slept.append)
    with pytest.raises(UtilityUnavailable, match=r"http://127\.0\.0\.1:9/v1.*after 2 attempts.*refused"):
        nobody.score("q", "a")


@pytest.mark.parametrize("status", [400, 401, 404])
def test_a_refusal_is_not_tried_again(endpoint: Endpoint, status: int) -> None:
    endpoint.replies = [status]
    judge, slept = client(endpoint)
    with pytest.raises(UtilityUnavailable, match=f"refuses: HTTP {status} try later"):
        judge.score("q", "a")
    assert slept == []
    assert len(endpoint.requests) == 1


def test_a_reply_without_a_score_is_asked_again_and_then_counts_as_the_lowest(
    endpoint: Endpoint, caplog: pytest.LogCaptureFixture
) -> None:
    endpoint.replies = ["Well.", "Score: 9", "Hm.", "Hm.", "Hm.", "Score: 5"]
    judge, _ = client(endpoint, retries=2)
    assert [judge.score("q", text) for text in "abc"] == [9, 1, 5]
    assert judge.usage.unparsed == 1
    assert judge.usage.retries == 3
    assert judge.usage.note == ("the judge gave 1 text no score, counted as 1; it said: 'Hm.' of the answer 'b' to 'q'")
    assert "no score can be read from 'Hm.'" in caplog.text


def test_a_judge_that_never_scores_stops_the_search(endpoint: Endpoint) -> None:
    endpoint.replies = ["As a language model, I"]
    judge, _ = client(endpoint, retries=0)
    assert [judge.score("q", text) for text in "abcd"] == [1] * 4
    with pytest.raises(UtilityUnavailable, match=r"five texts in a row .*As a language model"):
        judge.score("q", "e")


def test_a_budget_is_kept(endpoint: Endpoint) -> None:
    judge, _ = client(endpoint, prompt_price=1e4, budget=1.5)
    judge.score("q", "a")
    judge.score("q", "b")
    assert judge.usage.cost == pytest.approx(2.0)
    with pytest.raises(UtilityUnavailable, match=r"budget of 1\.5 is spent"):
        judge.score("q", "c")
    assert judge.score("q", "a") == 7


def test_a_missing_key_and_bad_settings_are_named(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with pytest.raises(UtilityUnavailable, match="JUDGE_KEY is not set"):
        client(endpoint, key_variable="JUDGE_KEY")[0].score("q", "a")
    for bad in ({"retries": -1}, {"timeout": 0.0}):
        with pytest.raises(BadParameter, match=next(iter(bad))):
            client(endpoint, **bad)
    with pytest.raises(BadParameter, match="http://"):
        JudgeSettings("localhost:8000", "m")


def test_the_utility_is_its_score(endpoint: Endpoint) -> None:
    endpoint.replies = ["Score: 2", "Score: 8"]
    generations = Generations(lambda prompt, mixture, request, chat: f"{prompt}!", DecodeRequest(max_bytes=4))
    judge = Judge([PromptExample(prompt=prompt) for prompt in "ab"], generations, client(endpoint)[0])
    scores = judge.evaluate([Mixture({"e0": 1.0})])
    assert scores.values.tolist() == [[2.0, 8.0]]
    assert scores.utility().tolist() == [5.0]
