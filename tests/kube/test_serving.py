"""The demo served on a cluster, in a namespace that enforces PodSecurity `restricted`."""

from __future__ import annotations

import signal
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kube.cluster import HOST, KEY, RELEASE, ROUTED, STALL, Namespace, ask, content, question, stream, wait

pytestmark = [pytest.mark.kube, pytest.mark.timeout(1200)]

DOORS = pytest.mark.parametrize("host", [HOST, ROUTED])


def test_the_preflights_table_is_in_its_containers_log(served: Namespace) -> None:
    pod = served.pod()["metadata"]["name"]
    said = served.kubectl("logs", pod, "-c", "preflight")
    assert "ok       checkpoint" in said
    assert "ok       memory" in said
    assert "preflight: 0 failed" in said
    assert served.last_words("preflight").startswith("preflight: 0 failed")


def test_helm_test_asks_it_a_sum(served: Namespace) -> None:
    assert "46" in served.helm("test", RELEASE, "--logs")


@DOORS
def test_it_answers_through_the_front_door(host: str, served: Namespace) -> None:
    status, body = ask(host, "/v1/chat/completions", question())
    assert status == 200
    assert "46" in content(body)


@DOORS
def test_a_stream_arrives_chunk_by_chunk(host: str, served: Namespace) -> None:
    found = stream(host)
    assert found.done
    assert len(found.times) > 50
    first, middle, last = found.times[0], found.times[len(found.times) // 2], found.times[-1]
    # Held back by a proxy, all would come at the end together.
    assert first < 0.5 * last
    assert first < middle < 0.9 * last


@DOORS
@pytest.mark.parametrize("key", [None, "wrong"])
def test_without_the_key_it_is_401(host: str, key: str | None, served: Namespace) -> None:
    assert ask(host, "/v1/chat/completions", question(), key=key)[0] == 401
    assert ask(host, "/v1/models", key=key)[0] == 401


@DOORS
@pytest.mark.parametrize(
    "path", ["/metrics", "/ready", "/live", "/drain", "/health", "/version", "/invocations", "/v1x"]
)
def test_nothing_but_the_api_is_reachable_from_outside(host: str, path: str, served: Namespace) -> None:
    assert ask(host, path)[0] == 404


def test_the_engines_pod_has_no_token_of_the_cluster(served: Namespace) -> None:
    pod = served.pod()["metadata"]["name"]
    found = served.kubectl("exec", pod, "-c", "engine", "--", "ls", "/var/run/secrets", check=False)
    assert "No such file" in found


def test_its_root_cannot_be_written_and_its_model_neither(served: Namespace) -> None:
    pod = served.pod()["metadata"]["name"]
    for place in ("/here", "/model/here"):
        found = served.kubectl("exec", pod, "-c", "engine", "--", "touch", place, check=False)
        assert "Read-only file system" in found


def test_its_rollout_is_said_to_be_over(served: Namespace) -> None:
    code, words = served.rollout()
    assert code == 0, words


def test_a_preflight_runs_where_the_engine_would_and_is_explained(served: Namespace) -> None:
    code, words = served.ops("preflight", "--timeout", "200")
    assert code == 0, words
    assert "ok       checkpoint" in words
    assert not served.get("jobs")["items"], "the Job is left behind"


def test_a_support_bundle_has_logs_and_no_key(served: Namespace, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle.tar.gz"
    code, words = served.ops("support-bundle", "--output", str(bundle))
    assert code == 0, words
    with tarfile.open(bundle) as archive:
        files = {file.name: archive.extractfile(file) for file in archive.getmembers() if file.isfile()}
        said = {name: file.read() for name, file in files.items() if file is not None}
    assert any(b"Application startup complete" in text for text in said.values())
    assert not [name for name, text in said.items() if KEY.encode() in text]


def signal_engine(served: Namespace, number: signal.Signals) -> None:
    """Sends a signal to vLLM's engine process, as nothing on a cluster would."""
    send = (
        "import os, pathlib\n"
        "for at in pathlib.Path('/proc').glob('[0-9]*/comm'):\n"
        f"    if 'EngineCor' in at.read_text(): os.kill(int(at.parent.name), {int(number)}); print('sent')\n"
    )
    pod = served.pod()["metadata"]["name"]
    assert "sent" in served.kubectl("exec", pod, "-c", "engine", "--", "python3", "-c", send)


def restarts(served: Namespace) -> int:
    [status] = served.pod()["status"]["containerStatuses"]
    return int(status["restartCount"])


def wait_for_restart(served: Namespace, before: int, seconds: float, why: str = "") -> None:
    wait("the container is restarted", lambda: restarts(served) == before + 1, seconds)
    assert why in served.rollout(1)[1]
    wait("the engine is back", served.is_ready, 300)
    wait("it answers", lambda: ask(HOST, "/v1/chat/completions", question())[0] == 200, 60)
    assert "46" in ask(HOST, "/v1/chat/completions", question())[1]


def test_a_killed_engine_is_restarted_and_answers_again(served: Namespace) -> None:
    before = restarts(served)
    signal_engine(served, signal.SIGKILL)
    wait_for_restart(served, before, 120, why="its engine process died")


def live(served: Namespace) -> str:
    """What the engine's `/live` says, asked through the API server: it is reachable by no front door."""
    pod = served.pod()["metadata"]["name"]
    return served.kubectl("get", "--raw", f"/api/v1/namespaces/{served.name}/pods/{pod}:8001/proxy/live", check=False)


def test_a_saturated_engine_is_left_alone(served: Namespace) -> None:
    """Many more long requests than it answers in the time that an engine may be silent."""
    before, began, said = restarts(served), time.monotonic(), set[str]()
    with ThreadPoolExecutor(64) as pool:
        while time.monotonic() - began < 1.5 * STALL:
            answers = [pool.submit(stream, HOST, 400) for _ in range(64)]
            while not all(answer.done() for answer in answers):
                # Three probes would have to fail in a row until the cluster restarted it: one is too many here.
                said.add(live(served))
                time.sleep(1)
            assert all(answer.result().done for answer in answers)
    assert all('"alive"' in each for each in said), said
    assert restarts(served) == before
    assert served.is_ready()


def test_a_frozen_engine_is_restarted_by_the_cluster(served: Namespace) -> None:
    """15 s of silence, three failed probes 10 s apart, 10 s of grace."""
    before = restarts(served)
    with ThreadPoolExecutor(1) as pool:
        signal_engine(served, signal.SIGSTOP)
        lost = pool.submit(ask, HOST, "/v1/chat/completions", question())
        wait_for_restart(
            served, before, STALL + 30 + 10 + 30, why="its liveness probe failed (Liveness probe failed: HTTP"
        )
        assert lost.result()[0] != 200


def test_a_drained_pod_is_out_of_rotation_and_stays(served: Namespace) -> None:
    code, words = served.ops("drain", "--timeout", "60")
    assert code == 0, words
    wait("no pod is ready", lambda: not served.is_ready(), 60)
    wait("no front door leads to it", lambda: ask(HOST, "/v1/models")[0] in (404, 502, 503), 60)
    served.kubectl("delete", "pod", served.pod()["metadata"]["name"], "--wait=false")
    served.wait_ready()
