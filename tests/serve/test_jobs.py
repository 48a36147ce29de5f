"""The queue: who waits, who is refused, who is cancelled, and what is told of them meanwhile."""

from __future__ import annotations

import json
import threading
import time
import weakref
from typing import Any

import httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from serve.conftest import INFO

from raphael.serve.door.problems import Problem
from raphael.serve.info import Catalogue
from raphael.serve.jobs import Limits

ASKED = {"prompt": "a red circle", "seed": 7, "num_inference_steps": 3}


def until(holds: Any, seconds: float = 10.0) -> None:
    deadline_s = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline_s, "it did not come true"
        time.sleep(0.01)


def submit(served: Any, **more: Any) -> str:
    answer = served.client.post("/v1/images?wait=false", json={**ASKED, **more})
    assert answer.status_code == 202, answer.text
    assert answer.headers["location"] == f"/v1/jobs/{answer.json()['id']}"
    return answer.json()["id"]


def state(served: Any, job: str) -> dict[str, Any]:
    return served.client.get(f"/v1/jobs/{job}").json()


def release(gate: Any, steps: int = 3) -> None:
    for _ in range(steps):
        gate.step.release()


def numbers(served: Any) -> dict[tuple, float]:
    families = text_string_to_metric_families(served.client.get("/metrics").text)
    return {(s.name, *sorted(s.labels.items())): s.value for family in families for s in family.samples}


def test_a_job_is_queued_runs_and_is_done_and_its_result_is_the_synchronous_answer(gated, gate):
    served = gated()
    first, second = submit(served), submit(served, seed=8)
    until(lambda: state(served, first)["state"] == "running")
    assert (state(served, second)["state"], state(served, second)["position"]) == ("queued", 0)
    gate.step.release()
    until(lambda: state(served, first)["step"] == 1)
    assert state(served, first)["progress"] == pytest.approx(1 / 3, abs=1e-4)
    release(gate, 2)
    until(lambda: state(served, first)["state"] == "done")
    told = state(served, first)
    assert told["progress"] == 1 and told["error"] is None and told["result"]["id"] == first
    assert told["result"]["images"] == [{"index": 0, "seed": 7, "b64_png": "AAAA"}]
    assert told["result"]["seconds"]["queue"] < 5
    release(gate)
    until(lambda: state(served, second)["state"] == "done")
    assert [task.body.seed for task in gate.begun] == [7, 8]


def test_beyond_the_queue_a_request_is_told_when_to_come_again(gated, gate):
    served = gated(limits=Limits(waiting=2))
    jobs = [submit(served)]
    until(lambda: gate.begun)
    jobs += [submit(served), submit(served)]
    refused = served.client.post("/v1/images", json=ASKED)
    assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
    assert refused.headers["content-type"] == "application/problem+json"
    assert numbers(served)["raphael_queue_jobs",] == 2 and numbers(served)["raphael_running_jobs",] == 1
    release(gate, 9)
    until(lambda: all(state(served, job)["state"] == "done" for job in jobs))
    assert numbers(served)["raphael_jobs_total", ("kind", "images"), ("state", "done")] == 3
    assert numbers(served)["raphael_requests_total", ("route", "/v1/images"), ("status", "429")] == 1


def test_a_cancelled_job_that_waits_never_runs_and_one_that_runs_stops(gated, gate):
    served = gated()
    running, waiting = submit(served), submit(served, seed=99)
    until(lambda: gate.begun)
    for job in (waiting, running):
        assert served.client.delete(f"/v1/jobs/{job}").status_code == 202
    until(lambda: state(served, running)["state"] == "cancelled")
    assert state(served, waiting)["state"] == "cancelled"
    after = submit(served, seed=3)
    release(gate)
    until(lambda: state(served, after)["state"] == "done")
    assert [task.body.seed for task in gate.begun] == [7, 3]
    assert served.client.delete(f"/v1/jobs/{after}").json()["state"] == "done"


def test_events_tell_the_present_state_at_once_then_steps_with_previews_then_the_result(gated, gate):
    served = gated()
    first, second = submit(served), submit(served)
    with served.client.stream("GET", f"/v1/jobs/{second}/events") as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        lines = stream.iter_lines()
        names, told = [], []

        def read() -> None:
            for line in lines:
                if line.startswith("event: "):
                    names.append(line.removeprefix("event: "))
                elif line.startswith("data: "):
                    told.append(json.loads(line.removeprefix("data: ")))
                    if names[-1] == "done":
                        return

        reader = threading.Thread(target=read)
        reader.start()
        until(lambda: told)
        assert names == ["queued"] and told[0]["position"] == 0
        release(gate)
        until(lambda: told[-1]["state"] == "running")
        for step in range(1, 4):
            gate.step.release()
            until(lambda step=step: told[-1]["step"] == step)
        reader.join(5)
    steps = [item for item in told if item["state"] == "running" and item["step"]]
    # the last one may come together with the end: who reads more slowly than steps are made sees the newest alone
    assert [item["step"] for item in steps][:2] == [1, 2] and steps[0]["sigma"] == 1.0
    assert all(item["previews"] == ["data:image/png;base64,AAAA"] for item in steps)
    assert set(names) == {"queued", "step", "done"} and names[-1] == "done"
    assert told[-1]["result"] == state(served, second)["result"]
    assert state(served, first)["state"] == "done"


def test_a_job_beyond_its_time_fails_and_says_so(gated):
    served = gated(limits=Limits(seconds=0.1))
    answer = served.client.post("/v1/images", json=ASKED)
    assert answer.status_code == 504 and "longer than 0.1 s" in answer.json()["detail"]


def test_a_client_that_goes_away_takes_its_job_with_it(gated, gate):
    served = gated()
    with pytest.raises(httpx.ReadTimeout):
        served.client.post("/v1/images", json=ASKED, timeout=0.3)
    until(lambda: numbers(served).get(("raphael_jobs_total", ("kind", "images"), ("state", "cancelled"))) == 1)
    assert len(gate.begun) == 1


def test_an_error_of_ours_is_a_500_that_tells_nothing_and_the_next_job_runs(gated, gate, caplog):
    served = gated()
    gate.fault = RuntimeError("a secret of the inside")
    release(gate)
    answer = served.client.post("/v1/images", json=ASKED)
    assert answer.status_code == 500 and "secret" not in answer.text and "secret" in caplog.text
    gate.fault = None
    release(gate)
    assert served.client.post("/v1/images", json=ASKED).status_code == 200


def test_ended_jobs_are_forgotten_beyond_number_age_and_size(gated, gate):
    served = gated(limits=Limits(kept=3))
    release(gate, 15)
    jobs = [served.client.post("/v1/images", json=ASKED).json()["id"] for _ in range(5)]
    found = [served.client.get(f"/v1/jobs/{job}").status_code for job in jobs]
    assert found[:2] == [404, 404] and found[-2:] == [200, 200]
    assert served.client.get("/v1/jobs/nothing").json()["detail"].startswith("no such job")
    tight = gated(limits=Limits(kept_bytes=10))
    release(gate)
    job = tight.client.post("/v1/images", json=ASKED).json()["id"]
    assert tight.client.get(f"/v1/jobs/{job}").status_code == 404


def test_the_server_ends_while_jobs_run_wait_and_are_watched(gated, gate):
    """The fixture's end holds the clock: the server has to be gone within seconds."""
    served = gated()
    answers: list[Any] = []

    def ask() -> None:
        answers.append(httpx.post(f"{served.url}/v1/images", json=ASKED, timeout=20, trust_env=False))

    asking = [threading.Thread(target=ask) for _ in range(2)]
    for thread in asking:
        thread.start()
    until(lambda: gate.begun and numbers(served)["raphael_queue_jobs",] == 1)
    job = submit(served)
    with httpx.stream("GET", f"{served.url}/v1/jobs/{job}/events", timeout=20, trust_env=False) as stream:
        lines = stream.iter_lines()
        next(lines)
        served.stop()
        assert any(line == "event: failed" for line in lines)
    for thread in asking:
        thread.join(5)
    assert [answer.status_code for answer in answers] == [503, 503]


def test_a_job_that_failed_keeps_nothing_of_what_it_worked_on(running):
    """Its answer is remembered for minutes; what was drawn until then would be tens of MB each."""
    drawn = []

    def perform(task, watch):
        maps = np.zeros(1000)
        drawn.append(weakref.ref(maps))
        try:
            raise ValueError("prompt: too long")
        except ValueError as error:
            raise Problem(422, str(error), "prompt") from None

    with running(Catalogue((INFO,)), perform) as served:
        assert served.client.post("/v1/images", json={"prompt": "a"}).status_code == 422
        job = served.client.post("/v1/images?wait=false", json={"prompt": "a"}).json()["id"]
        until(lambda: served.client.get(f"/v1/jobs/{job}").json()["state"] == "failed")
        until(lambda: len(drawn) == 2 and not any(maps() is not None for maps in drawn))
        assert served.client.get(f"/v1/jobs/{job}").json()["error"]["field"] == "prompt"
