"""Why a container does not run, or does not answer: from its state, events and log to sentences with the remedy."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vqserve_ops.objects import Object
from vqserve_ops.rollout.pending import containers, last_message, limits

Log = Callable[[str, bool], str]
"""The end of a container's log, of the one before the last restart if the second argument says so."""

_OURS = re.compile(r"^(vqserve(?:-ops)?): error: (?P<said>.*)$", re.MULTILINE)
_TELLING = re.compile(
    r"^.*(OutOfMemoryError|NCCL (?:error|WARN)|CUDA error|No space left on device"
    r"|(?:\w+\.)*\w+(?:Error|Exception): \S).*$",
    re.MULTILINE,
)
_PREFIX = re.compile(r"^\([^)]*pid=\d+\)\s*|^(?:ERROR|CRITICAL)\s+\S+\s+\S+\s+\[[^]]*\]\s*")
_LINES = 3
_WORDS = 300
_SIGNALS = {132: "an instruction that its CPU lacks", 134: "an abort", 135: "a bus error", 139: "a segmentation fault"}
_REMEDIES = (
    (r"OutOfMemoryError|CUDA out of memory", "lower engine.maxModelLen or engine.gpuMemoryUtilization"),
    (r"NCCL", "set engine.pcie: noP2P, and see what preflight says of IOMMU and ACS"),
    (r"CUDA error", "look at the node's driver (nvidia-smi, dmesg | grep Xid)"),
    (r"No space left on device", "enlarge cache.size or the volume"),
)


def why_failing(pod: Object, events: Sequence[Object], log: Log) -> list[str]:
    """What is wrong with a pod's containers; empty if nothing is, or not yet."""
    status = pod.get("status", {})
    if status.get("reason") == "Evicted":
        return [f"the node put it out ({status.get('message', '')}); see what filled the node's memory or disk"]
    states = {
        found["name"]: found
        for found in [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]
    }
    said = []
    for container in containers(pod):
        if state := states.get(container["name"]):
            said += [f"{container['name']}: {text}" for text in _why(pod, container, state, events, log)]
    return said


def _why(
    pod: Object, container: Mapping[str, Any], state: Mapping[str, Any], events: Sequence[Object], log: Log
) -> list[str]:
    now: Mapping[str, Any] = state.get("state") or {}
    waiting: Mapping[str, Any] = now.get("waiting") or {}
    if text := why_not_created(container, waiting):
        return [text]
    ended = now.get("terminated") or {}
    is_again = not ended and bool(waiting.get("reason") == "CrashLoopBackOff" or state.get("restartCount"))
    last: Mapping[str, Any] = ended or ((state.get("lastState") or {}).get("terminated") or {} if is_again else {})
    is_init = container["name"] in {found["name"] for found in pod["spec"].get("initContainers") or []}
    if last and not (ended and is_init and ended.get("exitCode") == 0):
        if "running" in now and state.get("ready"):
            return []
        count = f" ({state['restartCount']} restarts)" if state.get("restartCount") else ""
        return [why_ended(container, last, probe_kill(pod, container, events), log, previous=not ended) + count]
    return []


def why_not_created(container: Mapping[str, Any], waiting: Mapping[str, Any]) -> str:
    """Why a container cannot be made; empty if it can."""
    reason, text = str(waiting.get("reason") or ""), " ".join(str(waiting.get("message") or "").split())
    image = container.get("image", "")
    if reason in ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "RegistryUnavailable"):
        if re.search(r"unauthorized|denied|authentication|forbidden|40[13]", text, re.IGNORECASE):
            return f"the registry does not give {image} to the node; set imagePullSecrets ({text[:_WORDS]})"
        if re.search(r"not found|manifest unknown|does not exist", text, re.IGNORECASE):
            return f"there is no image {image}; correct repository and tag or digest"
        if reason == "ErrImageNeverPull":
            return f"the node does not hold {image}, and pullPolicy is Never; load it there, or change the policy"
        return f"the node cannot fetch {image} ({text[:_WORDS] or reason}); check its name and the node's network"
    if reason == "CreateContainerConfigError":
        if match := re.search(r'secret "([^"]+)" not found', text):
            return f"there is no Secret {match[1]}; make it, or correct auth.existingSecret"
        if match := re.search(r"couldn't find key (\S+) in Secret (\S+)", text):
            return f"Secret {match[2]} has no key {match[1]}; add it, or correct auth.key"
        if "runAsNonRoot" in text or "non-root" in text:
            return f"{image} would run as root; set podSecurity.runAsUser, or take the project's image ({text})"
        return f"its configuration is refused ({text}); correct the values"
    if reason in ("CreateContainerError", "RunContainerError", "StartError"):
        return f"the node cannot start it ({text[:_WORDS]}); look at its runtime, and at the NVIDIA container toolkit"
    return ""


def why_ended(container: Mapping[str, Any], ended: Mapping[str, Any], probe: str, log: Log, *, previous: bool) -> str:
    """Why a container has ended, from its state and its last words."""
    name, code = container["name"], ended.get("exitCode")
    message = str(ended.get("message") or "")
    if ended.get("reason") == "OOMKilled":
        memory = limits(container).get("memory")
        whose = f"its memory limit of {memory}" if memory else "the node's memory"
        return f"it needed more than {whose}; raise resources.limits.memory (shm.size counts as part of it)"
    if name == "preflight" and (found := failed_checks(message)):
        return f"this node cannot serve so: {found}"
    if probe:
        return probe
    words = last_words(log(name, previous)) or last_words(message)
    if code in _SIGNALS:
        return f"it ended by {_SIGNALS[code]} (exit code {code}); its last words: {words or 'none'}"
    if code == 137:
        return f"it was killed (exit code 137); see the node's events and memory; its last words: {words or 'none'}"
    if code == 0 and name == "engine":
        return f"its engine process died (vLLM then ends with 0); its last words: {words or 'none'}"
    return words or f"it ended with exit code {code} and said nothing; kubectl logs --container {name} --previous"


def failed_checks(message: str) -> str:
    """The lines of a preflight's termination message that say what failed."""
    failed = [line.removeprefix("FAIL: ") for line in message.splitlines() if line.startswith("FAIL: ")]
    settings = [line for line in message.splitlines() if line.startswith("settings: ")]
    return " | ".join([*failed, *settings]) if failed else ""


def last_words(text: str) -> str:
    """The line of a log that says why it ended: one of ours, an exception, or the last ones; with a remedy if known."""
    if found := list(_OURS.finditer(text)):
        return found[-1]["said"][: 2 * _WORDS]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    telling = [line for line in lines if _TELLING.match(line)]
    if not telling:
        return " | ".join(_PREFIX.sub("", line)[:_WORDS] for line in lines[-_LINES:])
    words = telling[-1]
    while (shorter := _PREFIX.sub("", words)) != words:
        words = shorter
    for pattern, remedy in _REMEDIES:
        if re.search(pattern, words):
            return f"{words[:_WORDS]}; {remedy}"
    return words[:_WORDS]


def probe_kill(pod: Object, container: Mapping[str, Any], events: Sequence[Object]) -> str:
    """That a probe had the container killed, and which; empty if none did."""
    text = last_message(pod, events, "Killing")
    match = re.search(r"Container (\S+) failed (startup|liveness) probe", text)
    if not match or match[1] != container["name"]:
        return ""
    answer = last_message(pod, events, "Unhealthy", f"{match[2].capitalize()} probe")
    if match[2] == "startup":
        probe = container.get("startupProbe") or {}
        seconds = int(probe.get("periodSeconds", 10)) * int(probe.get("failureThreshold", 3))
        return f"it was not ready within {seconds} s ({answer}); raise probes.startup.budgetSeconds, or see its log"
    return f"its liveness probe failed ({answer}): the engine hung; see the log of before the restart"
