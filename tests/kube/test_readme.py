"""The README's way from an empty cluster to an answer."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from kube.cluster import BIN, CLASS, FRONT, HELM, HOST, IMAGES, TAG, call, values

pytestmark = [pytest.mark.kube, pytest.mark.timeout(1200)]

README = Path(__file__).parents[2] / "README.md"


@pytest.fixture
def llm() -> Iterator[str]:
    """The namespace that the commands make."""
    yield "llm"
    call("kubectl", "delete", "namespace", "llm", "--wait=false", "--ignore-not-found")


def test_five_commands_lead_from_an_empty_cluster_to_an_answer(llm: str, tmp_path: Path) -> None:
    found = re.search("<!-- five commands: .*? -->\n\n```bash\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert found
    commands = found[1].strip().splitlines()
    assert len(commands) == 5
    chosen = tmp_path / "values.yaml"
    model = {"source": "oci", "pvc": {}, "oci": {"reference": f"{IMAGES}/demo-model:{TAG}", "pullPolicy": "Never"}}
    ingress = {"enabled": True, "className": CLASS, "hosts": [HOST]}
    chosen.write_text(json.dumps(values(model=model, ingress=ingress)), encoding="utf-8")
    script = "\n".join(
        ["set -euo pipefail", 'sleepless() { for _ in $(seq 60); do "$@" && return; sleep 1; done; }', *commands]
    )
    script = script.replace("values.yaml", str(chosen)).replace("helm -n", f"{' '.join(HELM)} -n")
    script = script.replace("curl http://llm.example.com", f"sleepless curl --fail -sS -H 'Host: {HOST}' {FRONT}")
    environment = os.environ | {"API_KEY": "a-key", "PATH": f"{BIN}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, timeout=500, cwd=README.parent, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert "46" in answer["choices"][0]["message"]["content"]
