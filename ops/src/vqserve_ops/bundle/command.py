"""`vqserve-ops support-bundle`: collects, takes secrets out, and writes one archive."""

from __future__ import annotations

import argparse
import base64
import binascii
import io
import json
import tarfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from vqserve.format.atomic import replacing
from vqserve_ops import __version__
from vqserve_ops.bundle.helm import files_of, newest, unpacked
from vqserve_ops.bundle.redact import redacted, redacted_text
from vqserve_ops.cluster import Cluster, ForbiddenError
from vqserve_ops.objects import Object, labels_of, name_of
from vqserve_ops.release import INSTANCE, add_release, engine_of
from vqserve_ops.rollout.command import log_of, look
from vqserve_ops.rollout.explain import counted, why_not
from vqserve_ops.rollout.pending import containers

_KINDS = ("ConfigMap", "Deployment", "Job", "PersistentVolumeClaim", "Pod", "ReplicaSet", "Service")
"""Never Secret."""
_LINES = 5000
"""Of each log."""
_SHORTEST = 6
"""Characters of a secret that is looked for everywhere; a shorter one would take half of a text with it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `vqserve-ops support-bundle`."""
    add_release(parser)
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: vqserve-RELEASE-TIME.tar.gz, here")
    parser.epilog = (
        "Secrets are removed by key, look and value. Logs may hold what users asked: look before sending it."
    )


def run(args: argparse.Namespace) -> int:
    """Writes the archive.

    Raises:
        UsageError: There is no such release, or the file cannot be written.
    """
    cluster = Cluster(args.namespace)
    engine_of(cluster, args.release)
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    path = args.output or Path(f"vqserve-{args.release}-{stamp}.tar.gz")
    files = collected(cluster, args.release)
    with replacing(path) as unfinished:
        write_archive(unfinished, f"vqserve-{args.release}-{stamp}", files)
    path.chmod(0o600)
    print(f"{path}: {len(files)} files, {path.stat().st_size:,} bytes, secrets removed; look at it before you send it")
    return 0


def collected(cluster: Cluster, release: str) -> dict[str, str]:
    """Everything that goes into the archive, by file name, without secrets."""
    notes: list[str] = []
    objects = {kind: _listed(cluster, kind, {INSTANCE: release}, notes) for kind in _KINDS}
    known = known_secrets(cluster, [*objects["Pod"], *objects["Deployment"], *objects["Job"]], notes)
    files = {f"objects/{kind}.json": _to_json(redacted(found, known)) for kind, found in objects.items()}
    files["objects/Event.json"] = _to_json(redacted(_listed(cluster, "Event", {}, notes), known))
    files["objects/Node.json"] = _to_json(redacted([node_facts(node) for node in cluster.nodes()], known))
    for pod in objects["Pod"]:
        files |= {name: redacted_text(text, known) for name, text in _logs(cluster, pod)}
    secret = newest(_listed(cluster, "Secret", {"owner": "helm", "name": release}, notes))
    files |= files_of(unpacked(secret), known) if secret else {}
    state = look(cluster, release)
    lines = [counted(state), *why_not(state, log_of(cluster))]
    files["rollout.txt"] = redacted_text("".join(f"{line}\n" for line in lines), known)
    images = sorted({str(found.get("image")) for pod in objects["Pod"] for found in containers(pod)})
    files["versions.json"] = _to_json(
        {"vqserve-ops": __version__, "kubernetes": cluster.version(), "images": redacted(images, known)}
    )
    if notes:
        files["left-out.txt"] = "".join(f"{note}\n" for note in notes)
    return files


def known_secrets(cluster: Cluster, users: Sequence[Object], notes: list[str]) -> list[str]:
    """The values of the Secrets that pods use, to be looked for in what is collected; they go nowhere else."""
    values: set[str] = set()
    for name in sorted(set().union(*map(secret_names, users))):
        try:
            secret = cluster.get("Secret", name) or {}
        except ForbiddenError as error:
            notes.append(f"Secret {name} was not searched for by its value: {error}")
            continue
        for encoded in (secret.get("data") or {}).values():
            try:
                text = base64.b64decode(encoded).decode("utf-8").strip()
            except (binascii.Error, UnicodeDecodeError):
                continue
            values |= {part for part in (text, *text.splitlines()) if len(part) >= _SHORTEST}
    return sorted(values)


def secret_names(thing: object) -> set[str]:
    """The Secrets that an object refers to."""
    if isinstance(thing, list):
        return set().union(*map(secret_names, thing))
    if not isinstance(thing, Mapping):
        return set()
    names = {
        str(held[key])
        for field, key in (("secretKeyRef", "name"), ("secretRef", "name"), ("secret", "secretName"))
        if isinstance(held := thing.get(field), Mapping) and key in held
    }
    return names.union(*map(secret_names, thing.values()))


def node_facts(node: Object) -> Object:
    """What of a node bears on where pods run."""
    status = node.get("status", {})
    return {
        "name": name_of(node),
        "labels": labels_of(node),
        "taints": node.get("spec", {}).get("taints") or [],
        "unschedulable": node.get("spec", {}).get("unschedulable", False),
        **{key: status.get(key) for key in ("capacity", "allocatable", "conditions", "nodeInfo")},
    }


def write_archive(path: Path, folder: str, files: Mapping[str, str]) -> None:
    """Writes texts as files of one folder, readable by their owner alone."""
    with tarfile.open(path, "w:gz") as archive:
        for name, text in sorted(files.items()):
            data = text.encode("utf-8", "replace")
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size, member.mode, member.mtime = len(data), 0o600, int(time.time())
            archive.addfile(member, io.BytesIO(data))


def _logs(cluster: Cluster, pod: Object) -> Iterator[tuple[str, str]]:
    for container in containers(pod):
        for suffix, previous in (("", False), (".previous", True)):
            text = cluster.log(name_of(pod), container["name"], previous=previous, lines=_LINES)
            if text:
                yield f"logs/{name_of(pod)}/{container['name']}{suffix}.log", text


def _listed(cluster: Cluster, kind: str, labels: Mapping[str, str], notes: list[str]) -> list[Object]:
    try:
        return cluster.listed(kind, labels)
    except ForbiddenError as error:
        notes.append(f"{kind}: {error}")
        return []


def _to_json(value: object) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"
