"""One release of the demo, for the tests that only look at it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from functools import partial

import pytest

from kube.cluster import (
    CLASS,
    HOST,
    ROUTED,
    STALL,
    Namespace,
    ask,
    claim_on,
    is_served,
    new_namespace,
    question,
    values,
    wait,
)

HOW = "tests/kube need a cluster: `make test-kube`, or KUBECONFIG and images that its nodes have (README, Kubernetes)"


@pytest.fixture(scope="session", autouse=True)
def cluster() -> None:
    if "KUBECONFIG" not in os.environ:
        pytest.fail(HOW)
    done = subprocess.run(["kubectl", "get", "nodes"], capture_output=True, text=True)
    assert done.returncode == 0, f"{HOW}\n{done.stderr}"


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    with new_namespace() as made:
        yield made


@pytest.fixture(scope="module")
def served() -> Iterator[Namespace]:
    """The demo on a local volume, behind an Ingress and behind a Gateway's HTTPRoute."""
    with new_namespace() as made:
        claim_on(made, "demo-model")
        listener = {"name": "web", "protocol": "HTTP", "port": 80, "allowedRoutes": {"namespaces": {"from": "Same"}}}
        made.apply(
            {
                "apiVersion": "gateway.networking.k8s.io/v1",
                "kind": "Gateway",
                "metadata": {"name": "front"},
                "spec": {"gatewayClassName": CLASS, "listeners": [listener]},
            }
        )
        made.install(
            values(
                engine={"stallSeconds": STALL},
                ingress={"enabled": True, "className": CLASS, "hosts": [HOST]},
                route={"enabled": True, "parentRefs": [{"name": "front"}], "hostnames": [ROUTED]},
            )
        )
        made.wait_ready()
        for host in (HOST, ROUTED):
            wait(f"{host} leads to it", partial(is_served, host), 60)
        assert "46" in ask(HOST, "/v1/chat/completions", question())[1]
        yield made
