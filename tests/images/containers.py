"""Runs the images that `make image` and `make image-serve` have built, by the variables that the Makefile sets."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from typing import Any

import pytest

LOCKED_DOWN = (
    "--read-only",
    "--user=10001:10001",
    "--cap-drop=all",
    "--security-opt=no-new-privileges",
    "--tmpfs=/tmp:rw,nosuid,nodev,mode=1777",
)
"""What Kubernetes' PodSecurity `restricted` asks for, and a root that cannot be written."""


def image(name: str, suffix: str = "") -> str:
    """The full name of one of our images; fails with the remedy if it has not been built."""
    full = f"{os.environ.get('IMAGES', 'localhost/vqserve')}/{name}:{os.environ.get('IMAGE_TAG', 'dev')}{suffix}"
    if subprocess.run([*_podman(), "image", "inspect", full], capture_output=True, check=False).returncode:
        target = "image-serve" if name == "serve" else "image"
        pytest.fail(f"{full} is not there: `make {target}`, which needs podman or docker, builds it and runs this test")
    return full


def run_command(image: str, *command: str, options: tuple[str, ...] = ()) -> list[str]:
    """The command line that runs a command in a locked-down container of an image, which goes when it ends."""
    limits = shlex.split(os.environ.get("PODMAN_RUN", "--network host"))
    return [*_podman(), "run", "--rm", *limits, *LOCKED_DOWN, *options, image, *command]


def output_of(image: str, *command: str, options: tuple[str, ...] = ()) -> str:
    """What a command prints in a locked-down container."""
    done = subprocess.run(run_command(image, *command, options=options), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def configuration(image: str) -> dict[str, Any]:
    """User, command, labels and variables of an image."""
    done = subprocess.run([*_podman(), "image", "inspect", image], capture_output=True, text=True, check=True)
    [found] = json.loads(done.stdout)
    config: dict[str, Any] = found["Config"]
    return config


def components(image: str) -> dict[str, str]:
    """Version of every Python package in the image's bill of materials, by name."""
    bill = json.loads(output_of(image, "cat", "/usr/share/doc/vqserve/sbom.cdx.json"))
    return {component["name"].lower().replace("_", "-"): component["version"] for component in bill["components"]}


def _podman() -> list[str]:
    return shlex.split(os.environ.get("PODMAN", "podman"))
