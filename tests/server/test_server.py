"""`examples/server`, as it runs: what it answers, what it refuses and how, and what it survives."""

from __future__ import annotations

import asyncio
import io
import json
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from types import SimpleNamespace

import pytest

pytest.importorskip("fastapi", reason="the server's requirements are not installed")
pytest.importorskip("prometheus_client", reason="the server's requirements are not installed")

from running import POLICIES, ROOT, STEPS, alone, running, soon

from examples.server import messages
from examples.server.app import unless_hung_up
from examples.server.errors import Refusal
from examples.server.messages import Job
from examples.server.settings import Settings, parse
from examples.server.worker import Worker
from memkern import demo

PROMPT = demo.memorized()[0][0]
THREADS, QUEUE, MOST = 2, 3, 500
LONG = {"prompt": PROMPT, "steps": MOST}
WIDTH = 128


@pytest.fixture(scope="module")
def server():
    limits = ("--threads", THREADS, "--queue", QUEUE, "--max-steps", MOST, "--max-body", 2**20, "--grace", 5)
    with running(*map(str, limits)) as started:
        yield started


def asked(policy, seed=0):
    return {"prompt": PROMPT, "policy": policy, "seed": seed}


def in_pool(server):
    return server.count("memkern_places", "generating") + server.count("memkern_places", "waiting")


def test_it_lives_at_once_and_is_ready_after_it_has_warmed_up(server):
    assert server.early["/healthz"].status == 200
    for path in ("/readyz", "/v1/images"):
        reply = server.early[path]
        assert (reply.status, reply.json["error"]) == (503, "not_ready")
        assert int(reply.headers["retry-after"]) >= 1
    assert server.count("memkern_ready") == 1


@pytest.mark.parametrize("policy", POLICIES)
def test_an_image_is_that_of_a_pipeline_alone(server, policy):
    reply = server.post(asked(policy))
    assert alone.is_image_of(reply, asked(policy))
    assert reply.headers["content-type"] == "image/png"
    assert reply.headers["x-memkern-policy"] == policy
    protected = int(policy != "none")
    assert reply.headers["x-memkern-rows"] == f"{protected} protected, {1 - protected} exempt, 0 unedited, 0 refused"


def test_what_a_request_leaves_out_is_in_the_reply(server):
    reply = server.post({"prompt": PROMPT})
    assert reply.headers["x-memkern-policy"] == POLICIES[0]
    again = server.post({"prompt": PROMPT, "seed": int(reply.headers["x-seed"]), "steps": STEPS})
    assert again.body == reply.body
    assert server.get("/v1/policies").json == {"default": POLICIES[0], "policies": list(POLICIES)}


REFUSED = {
    "malformed": (b'{"prompt": ', 400, "malformed_json", ["expected JSON", "character 11"]),
    "no UTF-8": (b'{"prompt": "\xff"}', 400, "malformed_json", ["UTF-8"]),
    "nested without end": (b"[" * 100_000, 400, "malformed_json", ["JSON"]),
    "no object": (b"[1]", 422, "invalid", ["expected a JSON object", "got [1]"]),
    "nothing": (b"", 422, "invalid", ["expected a JSON object", "got nothing"]),
    "no prompt": ({}, 422, "invalid", ["prompt", "prompt_embeds", "neither"]),
    "a number for a prompt": ({"prompt": 3}, 422, "invalid", ["prompt: should be a valid string", "got 3"]),
    "an unknown field": ({"prompt": "a", "promt": "b"}, 422, "invalid", ["promt: there is no such field"]),
    "an unknown policy": (asked("zero-pad:0.9"), 422, "unknown_policy", [*map(repr, POLICIES), "'zero-pad:0.9'"]),
    "half a character": (rb'{"prompt": "\ud83d"}', 422, "invalid", ["prompt", "unicode"]),
    "half a character for a name": (rb'{"\ud83d": 1}', 422, "invalid", [r"got '\ud83d'"]),
    "many steps": ({"prompt": "a", "steps": MOST + 1}, 422, "invalid", [f"at most {MOST}", f"got {MOST + 1}"]),
    "no steps": ({"prompt": "a", "steps": 0}, 422, "invalid", ["steps: should be greater", "got 0"]),
    "a seed below 0": ({"prompt": "a", "seed": -1}, 422, "invalid", ["seed", "got -1"]),
    "a guidance that is no number": (b'{"prompt": "a", "guidance": NaN}', 422, "invalid", ["guidance", "finite"]),
    "many tokens": ({"prompt": "a cat " * 40}, 422, "refused", ["prompt: expected at most 75 tokens, got"]),
    "many characters": ({"prompt": "a" * 1001}, 422, "prompt_too_long", ["at most 1000 characters", "got 1001"]),
    "many bytes": ({"prompt": "a" * 2**20}, 413, "body_too_large", ["at most 1048576 bytes", "got 10485"]),
    "narrow embeddings": (
        {"prompt_embeds": [[0.5] * 3] * 77, "policy": "none"}, 422, "refused", [f"rows of {WIDTH}", "rows of 3"],
    ),
    "embeddings of nothing": ({"prompt_embeds": []}, 422, "refused", [f"rows of {WIDTH}", "none"]),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_names_what_came_and_what_is_right(server, name):
    body, status, error, words = REFUSED[name]
    reply = server.post(body)
    assert (reply.status, reply.json["error"]) == (status, error), reply.json
    assert [word for word in words if word not in reply.json["reason"]] == [], reply.json
    assert reply.json["request_id"] == reply.headers["x-request-id"]


def test_a_place_that_there_is_not(server):
    assert server.get("/v1/nothing").json["reason"] == "there is no GET /v1/nothing"
    reply = server.get("/v1/images")
    assert (reply.status, reply.json["reason"]) == (405, "there is no GET /v1/images, but POST")


@pytest.mark.parametrize("policy", [policy for policy in POLICIES if policy != "none"])
def test_what_would_go_unedited_is_not_generated(server, policy):
    """Embeddings made elsewhere: refused with memkern's reason, and counted."""
    before = server.count("memkern_rows_total", policy, "refused")
    reply = server.post({"prompt_embeds": [[0.5] * WIDTH] * 77, "policy": policy})
    assert (reply.status, reply.json["error"]) == (422, "unedited")
    assert "would not be protected" in reply.json["reason"]
    server.logged(reply)
    assert server.count("memkern_rows_total", policy, "refused") == before + 1
    assert server.count("memkern_rows_total", policy, "unedited") == 0


def test_metrics_are_memkerns_reports(server):
    before, policy = server.metrics(), "zero-pad:0.7"
    server.logged(server.post(asked(policy, 1)), server.post(asked("none", 1)))
    after = server.metrics()

    def more(*name):
        return after.since(before, *name)

    for asked_for, outcome in ((policy, "protected"), ("none", "exempt")):
        assert more("memkern_rows_total", asked_for, outcome) == 1
        assert more("memkern_requests_total", asked_for, "200") == 1
        assert more("memkern_request_seconds_count", asked_for) == 1
        assert more("memkern_generate_seconds_sum", asked_for) > 0
        assert more("memkern_kept_bytes_sum", asked_for) > 0
    assert after.of("memkern_worker_process_resident_memory_bytes") > 2**26


def test_one_request_too_many_is_asked_to_come_again(server):
    with ExitStack() as clients:
        for _ in range(THREADS + QUEUE):
            clients.enter_context(server.hanging(LONG))
        soon(lambda: in_pool(server) == THREADS + QUEUE, "all places are taken")
        reply = server.post(asked("none"))
        assert (reply.status, reply.json["error"]) == (503, "full")
        assert int(reply.headers["retry-after"]) >= 1
        assert server.is_ready
    soon(lambda: in_pool(server) == 0, "places of clients that hung up are free")


def test_a_client_that_hangs_up_is_worked_for_no_longer(server):
    cancelled = server.count("memkern_requests_total", POLICIES[0], "499")
    with server.hanging(LONG):
        soon(lambda: server.count("memkern_places", "generating") == 1, "it is being generated")
    soon(lambda: server.count("memkern_requests_total", POLICIES[0], "499") == cancelled + 1, "it was seen")
    # 500 steps take seconds: the threads are free long before.
    replies = [server.post(asked(policy)) for policy in POLICIES]
    assert all(alone.is_image_of(reply, asked(policy)) for reply, policy in zip(replies, POLICIES, strict=True))


def test_a_worker_killed_in_mid_request(server):
    """Its requests get 503 and may retry; those that wait are served by the next worker; the server lives on."""
    starts, killed = server.count("memkern_worker_starts"), server.worker
    with ThreadPoolExecutor(THREADS + 1) as clients:
        lost = [clients.submit(server.post, LONG) for _ in range(THREADS)]
        soon(lambda: server.count("memkern_places", "generating") == THREADS, "all threads generate")
        waiting = clients.submit(server.post, asked("zero-pad:0.7"))
        soon(lambda: server.count("memkern_places", "waiting") == 1, "one waits")
        killed.kill()
        for reply in (one.result() for one in lost):
            assert (reply.status, reply.json["error"]) == (503, "worker_lost")
            assert "status -9" in reply.json["reason"]
            assert int(reply.headers["retry-after"]) >= 1
        assert server.get("/healthz").status == 200
        assert server.get("/readyz").status == 503
        assert alone.is_image_of(waiting.result(), asked("zero-pad:0.7"))
    assert server.is_ready
    assert server.worker.pid != killed.pid
    assert server.count("memkern_worker_starts") == starts + 1


@pytest.mark.slow
def test_a_worker_that_hangs_is_replaced(server):
    stopped = server.worker
    stopped.suspend()
    with server.hanging(LONG):
        soon(lambda: server.count("memkern_places", "generating") == 1, "it has been given to the worker")
    assert server.get("/healthz").status == 200
    soon(lambda: not stopped.is_running(), "the worker is killed", 60)
    soon(lambda: server.is_ready, "another is ready")
    assert alone.is_image_of(server.post(asked("none")), asked("none"))


def test_logs_are_one_object_a_line_and_have_no_prompt(server):
    [last] = server.logged(server.post({"prompt": "xylophone", "policy": "none"}))
    lines = server.logs()
    assert last.items() >= {"method": "POST", "path": "/v1/images", "status": 200, "policy": "none"}.items()
    assert last["rows"].startswith("0 protected, 1 exempt")
    assert any(line["logger"] == "memkern" for line in lines)
    assert "xylophone" not in json.dumps(lines)


@pytest.mark.slow
def test_it_ends_with_what_it_began():
    """SIGTERM: the image that is being generated is sent, then both processes end."""
    with running() as own:
        worker = own.worker
        with ThreadPoolExecutor(1) as client:
            reply = client.submit(own.post, {"prompt": PROMPT, "steps": 50})
            soon(lambda: own.count("memkern_places", "generating") == 1, "it generates")
            own.process.send_signal(signal.SIGTERM)
            assert reply.result().status == 200
        assert own.process.wait(30) == -signal.SIGTERM
        soon(lambda: not worker.is_running(), "the worker has ended", 30)


@pytest.mark.slow
def test_a_worker_does_not_outlive_its_server():
    with running() as own:
        worker = own.worker
        own.process.kill()
        soon(lambda: not worker.is_running(), "the worker has ended", 30)


def test_the_server_itself_is_small():
    """torch is the worker's alone: a server that only speaks HTTP answers while the worker loads."""
    code = "import sys; import examples.server.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_a_worker_that_cannot_start_ends_the_server():
    command = [sys.executable, "-m", "examples.server", "--port", "0", "--policy", "zero-pads"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=180)
    assert done.returncode == 1
    assert "zero-pads" in done.stderr.splitlines()[-1]


def test_an_error_in_the_pipeline_is_logged_under_its_request(caplog):
    """The client sees the error's type and its request's id; the traceback stays in the log, under that id."""
    out = io.BytesIO()

    def generate(job, is_cancelled):
        raise ZeroDivisionError("secret")

    worker = Worker(SimpleNamespace(generate=generate), 1, out)
    job = Job("a cat", "none", seed=0, steps=1, guidance=7.5, request_id="0123456789abcdef")
    worker.take(json.loads(messages.write_job(7, job)))
    worker._threads.shutdown()
    (line,) = out.getvalue().splitlines()
    answer = messages.read_answer(json.loads(line))
    assert (answer.kind, answer.reason) == ("failed", "ZeroDivisionError in the pipeline")
    (logged,) = caplog.records
    assert logged.request_id == "0123456789abcdef"
    assert logged.exc_info[0] is ZeroDivisionError


def test_time_is_up():
    async def never():
        await asyncio.sleep(60)

    with pytest.raises(Refusal) as raised:
        asyncio.run(unless_hung_up(SimpleNamespace(receive=never), never(), 0.05))
    assert (raised.value.status_code, raised.value.detail["error"]) == (504, "timeout")


def test_settings_of_a_command_line(capsys):
    found = parse(["--model", "here", "--policy", "swap-pad", "--policy", "none", "--threads", "3"])
    assert found == Settings(model="here", policies=("swap-pad", "none"), threads=3)
    assert Settings.from_json(found.as_json()) == found
    with pytest.raises(SystemExit):
        parse(["--threads", "0"])
    assert "threads: expected at least 1, got 0" in capsys.readouterr().err
