"""Load tests from the chart: a master and two workers load the engine through the ingress; the verdict is the Job's."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kube.cluster import CLASS, HOST, IMAGES, RELEASE, TAG, Namespace, values, wait

pytestmark = [pytest.mark.kube, pytest.mark.timeout(1200)]

INGRESS = "http://traefik.ingress.svc"
PROFILE = """description = "Sums, two at a time"
[options]
max_tokens = 64
reasoning = false
[traffic]
kind = "closed"
users = 2
seconds = 15
warm_up_s = 5
[[prompts]]
kind = "sum"
"""


def load(namespace: Namespace, slo: str) -> tuple[str, bool]:
    """Rolls the release out and then loads it; the Job's name and whether it succeeded."""
    loadtest = {
        "enabled": True,
        "image": {"repository": f"{IMAGES}/loadtest", "tag": TAG},
        "host": INGRESS,
        "hostHeader": HOST,
        "profileToml": PROFILE,
        "slo": slo,
        "resources": {"requests": {"cpu": "100m", "memory": "128Mi"}, "limits": {"memory": "1Gi"}},
    }
    ingress = {"enabled": True, "className": CLASS, "hosts": [HOST]}
    namespace.install(values(ingress=ingress))
    namespace.wait_ready()
    engine = namespace.pod()["metadata"]["uid"]
    namespace.install(values(loadtest=loadtest, ingress=ingress))
    revision = json.loads(namespace.helm("list", "--output", "json"))[0]["revision"]
    masters = f"app.kubernetes.io/instance={RELEASE},app.kubernetes.io/component=loadtest-master"
    jobs = [item["metadata"]["name"] for item in namespace.get("jobs", "-l", masters)["items"]]
    [job] = [name for name in jobs if name.startswith(f"{RELEASE}-vqserve-loadtest-{revision}-")]

    def ended() -> Any:
        conditions = namespace.get("job", job).get("status", {}).get("conditions", [])
        return [c["type"] for c in conditions if c["status"] == "True" and c["type"] in ("Complete", "Failed")]

    try:
        kept = "Complete" in wait(f"{job} has ended", ended, 300)
    except AssertionError as error:
        said = namespace.kubectl("logs", "--all-containers", "--prefix", f"job/{job}", check=False)
        pods = namespace.kubectl("describe", "pods", check=False)
        raise AssertionError(f"{error}\n{said[-6000:]}\n{pods[-6000:]}") from None
    assert namespace.pod()["metadata"]["uid"] == engine, "a load test is no reason for a new engine"
    return job, kept


def exit_code(namespace: Namespace, job: str) -> int:
    """Of the master's container."""
    [pod] = namespace.get("pods", "-l", f"batch.kubernetes.io/job-name={job}")["items"]
    found = {s["name"]: s["state"]["terminated"]["exitCode"] for s in pod["status"]["containerStatuses"]}
    return int(found["locust"])


def test_workers_load_the_engine_through_the_ingress_and_the_job_ends_as_the_slo_says(served: Namespace) -> None:
    job, kept = load(served, "ttft_s=60,failures=0")
    report = served.kubectl("logs", f"job/{job}", "--container", "report")
    assert kept, report[-3000:] + served.kubectl("logs", f"job/{job}", "--container", "locust")[-3000:]
    assert exit_code(served, job) == 0
    assert report.startswith("<!doctype html>")
    assert report.rstrip().endswith("</html>")
    assert "SLO ttft_s=60,failures=0,percentile=90: kept" in report
    assert "Sent by 2 workers." in report
    assert "The server&#39;s own account" in report or "The server's own account" in report
    assert "nothing came from worker" not in report
    workers = served.get("job", job.replace("-loadtest-", "-workers-"))["status"]
    assert workers["succeeded"] == 2


def test_a_broken_slo_fails_the_job_and_its_report_says_why(served: Namespace) -> None:
    job, kept = load(served, "ttft_s=0.0001,failures=0")
    assert not kept
    assert exit_code(served, job) == 1
    assert "TTFT p90" in served.kubectl("logs", f"job/{job}", "--container", "report")
