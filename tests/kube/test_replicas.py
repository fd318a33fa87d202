"""Two replicas, upgraded under load."""

from __future__ import annotations

import threading

import pytest

from kube.cluster import CLASS, HOST, Namespace, Stream, claim_on, is_served, stream, values, wait

pytestmark = [pytest.mark.kube, pytest.mark.timeout(1200)]


def test_an_upgrade_of_two_replicas_loses_no_request_and_cuts_no_stream(namespace: Namespace) -> None:
    claim_on(namespace, "demo-model")
    pair = {
        # Each takes one of the node's two GPUs, so that there is no room for a third.
        "engine": {"device": "cuda", "gpus": 1},
        "replicaCount": 2,
        # Beside the load an engine that has nothing left to do takes as long to end as it may.
        "drain": {"waitSeconds": 5, "seconds": 20},
        "pdb": {"enabled": True},
        "resources": {"requests": {"cpu": "500m", "memory": "3Gi"}, "limits": {"memory": "6Gi"}},
        "ingress": {"enabled": True, "className": CLASS, "hosts": [HOST]},
    }
    namespace.install(values(**pair))
    namespace.wait_ready()
    wait("the front door leads to it", lambda: is_served(HOST), 60)
    before = {pod["metadata"]["name"] for pod in namespace.pods()}
    found: list[Stream] = []
    lost: list[Exception] = []
    over = threading.Event()

    def load() -> None:
        while not over.is_set():
            try:
                found.append(stream(HOST, tokens=80))
            except Exception as error:  # noqa: BLE001 - whatever it is, a request is lost
                lost.append(error)

    threads = [threading.Thread(target=load) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        wait("streams come", lambda: len(found) >= 4, 60)
        namespace.install(values(podAnnotations={"generation": "2"}, **pair))
        namespace.wait_ready(600)
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert before.isdisjoint(pod["metadata"]["name"] for pod in namespace.pods())
    assert not lost
    assert all(each.done for each in found)
