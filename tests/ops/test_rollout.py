"""Why a release does not serve, in words, each with the remedy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from ops.objects import Made, deployment, event, pod, replica_set, state, unschedulable
from vqserve_ops.rollout.explain import (
    Release,
    counted,
    is_given_up,
    is_rolled_out,
    stage_of,
    why_not,
    why_pod_not,
)
from vqserve_ops.rollout.failing import last_words


def silent(*_: object) -> str:
    return ""


def why(thing: Made, *events: Made, log: str = "") -> list[str]:
    found = why_pod_not(thing, events, lambda *_: log)
    for sentence in found:
        assert "\n" not in sentence
    return found


NODES = "0/6 nodes are available: "


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("2 Insufficient nvidia.com/gpu.", ["2 nodes have too few free GPUs, and the pod wants 2 of one node; "]),
        ("1 Insufficient memory, 1 Insufficient cpu.", ["1 node has too little free memory", "1 node has too little"]),
        (
            "3 node(s) didn't match Pod's node affinity/selector.",
            ["3 nodes are not labelled nvidia.com/gpu.product In (RTX-A, RTX-B); "],
        ),
        (
            "1 node(s) had untolerated taint {dedicated: llm}.",
            ["1 node has a taint that is not tolerated (dedicated: llm); add it to scheduling.tolerations"],
        ),
        ("1 node(s) had untolerated taint(s).", ["1 node has a taint that is not tolerated (see the node)"]),
        ("1 node(s) were unschedulable.", ["1 node is cordoned; kubectl uncordon"]),
        ('persistentvolumeclaim "glm" not found.', ["there is no PersistentVolumeClaim glm; make it"]),
        ("pod has unbound immediate PersistentVolumeClaims.", ["a claim of its is not bound (glm-model); "]),
        ("1 node(s) didn't find available persistent volumes to bind.", ["a claim of its is not bound (glm-model); "]),
        ("2 node(s) had volume node affinity conflict.", ["2 nodes are not where its volume is; "]),
        ("1 cannot allocate all claims.", ["no node has the devices of its resource claim; check scheduling.dra"]),
        ("something new.", ["no node takes it (0/6 nodes are available: something new)"]),
    ],
)
def test_what_the_scheduler_says_is_said_in_words(message: str, expected: list[str]) -> None:
    more = " preemption: 0/6 nodes are available: 2 No preemption victims found, 4 Insufficient cpu."
    found = why(unschedulable(NODES + message + more))
    assert len(found) == len(expected)
    for sentence, begin in zip(found, expected, strict=True):
        assert sentence.startswith(begin)


def test_several_reasons_are_several_sentences() -> None:
    found = why(
        unschedulable(
            "0/3 nodes are available: 1 Insufficient nvidia.com/gpu, 1 node(s) had untolerated taint "
            "{node-role.kubernetes.io/control-plane: }, 1 node(s) didn't match Pod's node affinity/selector."
        )
    )
    assert [sentence.split()[0:3] for sentence in found] == [
        ["1", "node", "has"],
        ["1", "node", "is"],
        ["1", "node", "has"],
    ]
    assert "(node-role.kubernetes.io/control-plane)" in found[2]


def labelled(name: str, gpus: int, labels: Mapping[str, str]) -> Made:
    return {"metadata": {"name": name, "labels": labels}, "status": {"allocatable": {"nvidia.com/gpu": str(gpus)}}}


def test_what_nodes_have_instead_is_said_beside_what_the_pod_wants() -> None:
    thing = unschedulable(NODES + "5 node(s) didn't match Pod's node affinity/selector, 1 Insufficient nvidia.com/gpu.")
    thing["spec"]["nodeSelector"] = {"pool": "llm"}
    nodes = [
        labelled("node-1", 1, {"pool": "llm", "nvidia.com/gpu.product": "RTX-B"}),
        labelled("bare", 0, {"pool": "llm"}),
        *(labelled(f"h-{i}", 8, {"pool": "llm", "nvidia.com/gpu.product": "H200"}) for i in range(4)),
    ]
    [labels, gpus] = sorted(why_pod_not(thing, [], silent, nodes), reverse=True)
    assert labels.startswith(
        "5 nodes are not labelled pool=llm, nvidia.com/gpu.product In (RTX-A, RTX-B) "
        "(of nvidia.com/gpu.product there are H200 (h-0, h-1, h-2 and 1 more), RTX-B (node-1), no such label (bare)); "
    )
    assert (
        "wants 2 of one node (in all, free or not, nodes have 8 (h-0, h-1, h-2 and 1 more), 1 (node-1), none (bare)); "
        in gpus
    )


@pytest.mark.parametrize(
    ("reason", "message", "expected"),
    [
        ("ImagePullBackOff", "pull access denied, 401 Unauthorized", "set imagePullSecrets"),
        ("ErrImagePull", "manifest unknown: not found", "there is no image r/serve:1; correct repository"),
        ("ErrImagePull", "dial tcp: i/o timeout", "the node cannot fetch r/serve:1 (dial tcp: i/o timeout)"),
        ("ErrImageNeverPull", "x", "the node does not hold r/serve:1, and pullPolicy is Never"),
        ("CreateContainerConfigError", 'secret "glm-key" not found', "there is no Secret glm-key; make it"),
        (
            "CreateContainerConfigError",
            "couldn't find key api-key in Secret llm/glm-key",
            "Secret llm/glm-key has no key api-key; add it",
        ),
        ("RunContainerError", "nvidia-container-cli: initialization error", "the NVIDIA container toolkit"),
    ],
)
def test_a_container_that_cannot_be_made(reason: str, message: str, expected: str) -> None:
    [found] = why(pod(engine=state(waiting={"reason": reason, "message": message})))
    assert found.startswith("engine: ")
    assert expected in found


def test_memory_names_the_limit() -> None:
    ended = {"reason": "OOMKilled", "exitCode": 137}
    thing = pod(engine=state(waiting={"reason": "CrashLoopBackOff"}, last=ended, restarts=3), limits={"memory": "4Gi"})
    [found] = why(thing)
    assert found == (
        "engine: it needed more than its memory limit of 4Gi; "
        "raise resources.limits.memory (shm.size counts as part of it) (3 restarts)"
    )


def test_a_corrupt_checkpoint_is_named_by_the_line_of_the_log() -> None:
    line = "/model/model-00003.safetensors: expected 4000 bytes, found 3999; restore the checkpoint from where it came"
    log = f"INFO starting\nvqserve: error: {line}\n"
    [found] = why(pod(engine=state(waiting={"reason": "CrashLoopBackOff"}, last={"exitCode": 2}, restarts=1)), log=log)
    assert found == f"engine: {line} (1 restarts)"


def test_a_dead_engine_ends_with_0() -> None:
    log = "(EngineCore pid=7) torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB\nbye\n"
    [found] = why(pod(engine=state(running={}, last={"exitCode": 0}, restarts=1)), log=log)
    assert "its engine process died" in found
    assert "torch.OutOfMemoryError: CUDA out of memory" in found
    assert "lower engine.maxModelLen" in found


def test_a_container_that_died_once_and_is_ready_again_is_no_fault() -> None:
    assert why(pod(engine=state(running={}, last={"exitCode": 1}, restarts=1, ready=True))) == []


def test_a_preflight_that_failed_says_what_and_the_settings() -> None:
    message = (
        "preflight: 1 failed, 0 to be warned of, 2 not visible from here, 9 right\n"
        "FAIL: all-reduce: hangs -> iommu=pt\nsettings: NCCL_P2P_DISABLE=1"
    )
    ended = {"exitCode": 1, "reason": "Error", "message": message}
    thing = pod(init=[state("wait-for-checkpoint", terminated={"exitCode": 0}), state("preflight", terminated=ended)])
    [found] = why(thing)
    assert found == (
        "preflight: this node cannot serve so: all-reduce: hangs -> iommu=pt | settings: NCCL_P2P_DISABLE=1"
    )


@pytest.mark.parametrize(
    ("which", "expected"),
    [("startup", "not ready within 1800 s"), ("liveness", "its liveness probe failed (Liveness probe failed: 500)")],
)
def test_a_probe_that_killed_it_is_named(which: str, expected: str) -> None:
    thing = pod(engine=state(running={}, last={"exitCode": 137, "reason": "Error"}, restarts=1))
    events = [
        event("Killing", f"Container engine failed {which} probe, will be restarted"),
        event("Unhealthy", f"{which.capitalize()} probe failed: 500"),
    ]
    [found] = why(thing, *events)
    assert expected in found


def test_what_the_next_container_answers_is_not_why_the_last_one_was_killed() -> None:
    thing = pod(engine=state(running={}, last={"exitCode": 137, "reason": "Error"}, restarts=1))
    events = [
        event("Killing", "Container engine failed liveness probe, will be restarted"),
        event("Unhealthy", "Liveness probe failed: HTTP probe failed with statuscode: 503"),
        event("Unhealthy", "Startup probe failed: connection refused", "2026-01-01T00:00:09Z"),
    ]
    [found] = why(thing, *events)
    assert "its liveness probe failed (Liveness probe failed: HTTP probe failed with statuscode: 503)" in found


def test_an_eviction_and_a_kill_are_told_apart() -> None:
    [evicted] = why(pod(reason="Evicted", message="The node was low on resource: memory.", phase="Failed"))
    assert "low on resource: memory" in evicted
    [killed] = why(pod(engine=state(waiting={"reason": "CrashLoopBackOff"}, last={"exitCode": 137}, restarts=1)))
    assert "it was killed (exit code 137)" in killed
    [fault] = why(pod(engine=state(waiting={"reason": "CrashLoopBackOff"}, last={"exitCode": 132}, restarts=1)))
    assert "an instruction that its CPU lacks" in fault


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ('MountVolume.SetUp failed for volume "token" : secret "hub" not found', "there is no Secret hub; make it"),
        ("references non-existent secret key: token", "the Secret has no key token"),
        ("hostPath type check failed: /srv/m is not a directory", "the node has no folder /srv/m"),
        ("something else", "FailedMount: something else"),
    ],
)
def test_a_volume_that_cannot_be_mounted(message: str, expected: str) -> None:
    thing = pod(engine=state(waiting={"reason": "PodInitializing"}))
    [found] = why(thing, event("FailedMount", "older", "2025-01-01T00:00:00Z"), event("FailedMount", message))
    assert expected in found


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            'pods "glm-h1-x" is forbidden: violates PodSecurity "restricted:latest": volume types (hostPath)',
            "PodSecurity 'restricted' refuses its pods: volume types (hostPath); set podSecurity.standard",
        ),
        ('pods "x" is forbidden: exceeded quota: gpus, requested: 2, used: 0, limited: 1', "quota is used up: gpus"),
        ('admission webhook "v.kyverno.svc" denied the request: no latest tags', "the cluster's policy v.kyverno.svc"),
        ("anything", "no pod can be made (anything)"),
    ],
)
def test_pods_that_are_refused(message: str, expected: str) -> None:
    refused = [{"type": "ReplicaFailure", "status": "True", "reason": "FailedCreate", "message": message}]
    [found] = why_not(Release(deployment(), [replica_set(conditions=refused)], [], []), silent)
    assert expected in found


@pytest.mark.parametrize(
    ("status", "done"),
    [
        ({"replicas": 2, "updatedReplicas": 2, "availableReplicas": 2}, True),
        ({"replicas": 2, "updatedReplicas": 1, "availableReplicas": 2}, False),
        ({"replicas": 3, "updatedReplicas": 2, "availableReplicas": 2}, False),
        ({"replicas": 2, "updatedReplicas": 2, "availableReplicas": 1}, False),
        ({"replicas": 2, "updatedReplicas": 2}, False),
    ],
)
def test_it_is_rolled_out_when_every_replica_is_new_and_serves(status: Mapping[str, Any], done: bool) -> None:
    assert is_rolled_out(deployment(wanted=2, **status)) is done
    assert not is_rolled_out(deployment(wanted=2, observed=1, **status))
    assert counted(Release(deployment(wanted=2, **status), [], [], [])).startswith("glm-vqserve: ")


def test_an_old_verdict_on_the_last_change_is_not_taken_for_this_one() -> None:
    late = [{"type": "Progressing", "status": "False", "reason": "ProgressDeadlineExceeded"}]
    assert is_given_up(deployment(conditions=late))
    assert not is_given_up(deployment(conditions=late, observed=1))


def test_only_pods_of_the_present_template_count() -> None:
    old = pod(engine=state(waiting={"reason": "ErrImagePull", "message": "not found"}))
    new = pod(engine=state(running={}))
    new["metadata"]["labels"]["pod-template-hash"] = "h2"
    release = Release(deployment(), [replica_set("h1", "2"), replica_set("h2", "3")], [old, new], [])
    assert release.current == [new]
    assert why_not(release, silent) == []


def test_a_pod_that_gets_on_says_what_it_does() -> None:
    waiting = pod(init=[state("wait-for-checkpoint", running={})])
    assert stage_of(waiting, lambda *_: "a\n1.00 of 2.00 GB\n") == "waits for the checkpoint (1.00 of 2.00 GB)"
    assert stage_of(pod(init=[state("preflight", running={})]), silent) == "runs preflight"
    assert stage_of(pod(engine=state(running={})), silent) == "loads"
    assert stage_of(pod(conditions=[{"type": "Ready", "status": "True"}]), silent) == "serves"
    assert stage_of(pod(), silent) == "waits for a node"


def test_last_words_are_the_telling_ones() -> None:
    text = "INFO ok\n(Worker pid=3) ERROR 01-01 10:00:00 [core.py:1] ValueError: no such layer\nshutting down\n"
    assert last_words(text) == "ValueError: no such layer"
    assert last_words("a\nb\nc\nd\n") == "b | c | d"
    assert last_words("") == ""
