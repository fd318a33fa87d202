"""What the chart renders for each of its example values, and what must hold in all of them."""

from __future__ import annotations

import ast
import difflib
import re
import shutil
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

import generate
from chart.helm import APIS, CHART, CI, helm, objects, of_kind, pod_specs, rendered, written
from values import Values

BASE = CHART / "ci" / "pvc-values.yaml"
GOLDEN = Path(__file__).parents[1] / "golden" / "chart"
MINORS = ["1.32", "1.34", "1.36"]
OTHERS_SCHEMAS = {"HTTPRoute", "InferencePool", "PrometheusRule", "ScaledObject", "ServiceMonitor"}
"""Kinds that are not Kubernetes's own; tests on a cluster have it check these."""

each_example = pytest.mark.parametrize("values", CI, ids=lambda path: path.name)


@each_example
def test_an_example_passes_helms_strict_lint(values: Path) -> None:
    done = helm("lint", "--strict", CHART, "--values", values)
    assert done.returncode == 0, done.stdout + done.stderr


@each_example
def test_an_example_renders_as_reviewed(values: Path, request: pytest.FixtureRequest) -> None:
    """After a change of the chart: `pytest tests/chart --update-golden`, and read the difference."""
    golden = golden_of(values)
    text = plain(values) if values == BASE else difference(plain(BASE), plain(values))
    if request.config.getoption("--update-golden"):
        golden.write_text(text, encoding="utf-8")
    assert text == golden.read_text("utf-8")


def golden_of(values: Path) -> Path:
    """One example is kept in full, of the others what differs from it."""
    return GOLDEN / values.name.replace("-values.yaml", ".yaml" if values == BASE else ".diff")


def plain(values: Path) -> str:
    """What is rendered, for people to review: without labels and our files, which are tested elsewhere."""
    found = sorted(objects(rendered("--values", values)), key=lambda item: (item["kind"], item["metadata"]["name"]))
    for item in found:
        item["metadata"].pop("labels", None)
        if item["kind"] == "Pod":
            item["spec"]["containers"][0]["args"] = ["(files/ask_a_sum.py)"]
        if item["kind"] == "PrometheusRule":
            item["spec"] = "(files/rules.yaml, filled in)"
        if item["kind"] == "ConfigMap":
            item["data"] = dict.fromkeys(item["data"], "(of files/dashboards)")
    return "".join(f"---\n{generate.dumped(item)}" for item in found)


def difference(before: str, after: str) -> str:
    return "\n".join(difflib.unified_diff(before.splitlines(), after.splitlines(), n=2, lineterm="")) + "\n"


def test_every_golden_file_has_its_example() -> None:
    assert set(GOLDEN.iterdir()) == {golden_of(values) for values in CI}


@pytest.mark.parametrize("minor", MINORS)
@each_example
def test_kubernetes_schemas_take_every_object(values: Path, minor: str) -> None:
    for item in objects(rendered("--values", values)):
        if item["kind"] not in OTHERS_SCHEMAS and not (item["kind"] == "ResourceClaimTemplate" and minor == "1.32"):
            kubernetes_validate.validate(item, minor, strict=True)


@each_example
def test_every_pod_keeps_to_pod_security_restricted(values: Path) -> None:
    for pod in pod_specs(objects(rendered("--values", values))):
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] == 10001
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in [*pod["containers"], *pod.get("initContainers", [])]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        kinds = {kind for volume in pod.get("volumes", []) for kind in volume if kind != "name"}
        allowed = {"configMap", "emptyDir", "image", "persistentVolumeClaim", "secret"}
        assert kinds <= allowed | ({"hostPath"} if values.name == "hostpath-values.yaml" else set())


@each_example
def test_selectors_hold_nothing_that_changes_and_select_the_engines_pods(values: Path) -> None:
    found = objects(rendered("--values", values))
    deployment = of_kind("Deployment", found)
    selector = deployment["spec"]["selector"]["matchLabels"]
    expected = {f"app.kubernetes.io/{part}" for part in ("name", "instance", "component")}
    assert set(selector) == expected
    assert selector.items() <= deployment["spec"]["template"]["metadata"]["labels"].items()
    services = [item["spec"] for item in found if item["kind"] == "Service"]
    assert [s["selector"] for s in services if "clusterIP" not in s] == [selector]
    # A master's is of the one Job that it was made for.
    assert all("batch.kubernetes.io/job-name" in s["selector"] for s in services if "clusterIP" in s)


@each_example
def test_a_pods_time_to_stop_covers_its_wait_and_its_requests(values: Path) -> None:
    pod = of_kind("Deployment", objects(rendered("--values", values)))["spec"]["template"]["spec"]
    [engine] = pod["containers"]
    wait = engine["lifecycle"]["preStop"]["exec"]["command"][-1]
    finish = engine["args"][engine["args"].index("--shutdown-timeout") + 1]
    assert pod["terminationGracePeriodSeconds"] > int(wait) + int(finish)


@each_example
def test_nothing_but_v1_is_routed(values: Path) -> None:
    for item in objects(rendered("--values", values)):
        if item["kind"] == "Ingress":
            paths = [path for rule in item["spec"]["rules"] for path in rule["http"]["paths"]]
            assert [(path["path"], path["pathType"]) for path in paths] == [("/v1", "Prefix")]
        if item["kind"] == "HTTPRoute":
            [rule] = item["spec"]["rules"]
            assert rule["matches"] == [{"path": {"type": "PathPrefix", "value": "/v1"}}]
            assert rule["timeouts"] == {"request": "0s", "backendRequest": "0s"}


@pytest.mark.parametrize(("budget", "period", "threshold"), [(1800, 5, 360), (601, 10, 61)])
def test_the_startup_probe_spends_the_whole_budget(budget: int, period: int, threshold: int, tmp_path: Path) -> None:
    startup = {"budgetSeconds": budget, "periodSeconds": period}
    values = {"model": {"pvc": {"claimName": "glm"}}, "probes": {"startup": startup}}
    found = objects(rendered("--values", written(values, tmp_path)))
    [engine] = of_kind("Deployment", found)["spec"]["template"]["spec"]["containers"]
    assert engine["startupProbe"]["failureThreshold"] == threshold


def test_another_source_makes_another_job_and_another_chart_does_not(tmp_path: Path) -> None:
    values = CHART / "ci" / "download-values.yaml"
    name = of_kind("Job", objects(rendered("--values", values)))["metadata"]["name"]
    other = rendered("--values", values, "--set", "model.download.url=hf://example/other")
    assert of_kind("Job", objects(other))["metadata"]["name"] != name
    chart = shutil.copytree(CHART, tmp_path / "chart")
    about = yaml.safe_load((chart / "Chart.yaml").read_text("utf-8"))
    (chart / "Chart.yaml").write_text(yaml.safe_dump(about | {"version": "9.9.9"}), encoding="utf-8")
    newer = objects(rendered("--values", values, chart=chart))
    assert of_kind("Job", newer)["metadata"]["name"] == name
    engine = of_kind("Deployment", newer)["spec"]["template"]
    assert engine == of_kind("Deployment", objects(rendered("--values", values)))["spec"]["template"]


def test_a_download_has_its_budget_before_a_rollout_has_failed(tmp_path: Path) -> None:
    def deadline(*arguments: str | Path) -> int:
        return int(of_kind("Deployment", objects(rendered(*arguments)))["spec"]["progressDeadlineSeconds"])

    download = CHART / "ci" / "download-values.yaml"
    assert deadline("--values", download) == deadline("--values", BASE) + 21600
    assert deadline("--values", download, "--set", "model.download.budgetSeconds=60") == deadline("--values", BASE) + 60
    assert f"--timeout {deadline('--values', download)}s" in notes(tmp_path, "--values", download)


def test_a_volume_of_one_node_is_filled_where_the_engine_waits_for_it(tmp_path: Path) -> None:
    def affinity(kind: str, mode: str) -> Any:
        volume = {"accessModes": [mode]}
        model = {"source": "download", "download": {"url": "https://models.example/glm", "volume": volume}}
        values = {"model": model, "scheduling": {"affinity": {"podAffinity": {required: [own]}}}}
        found = objects(rendered("--values", written(values, tmp_path)))
        return of_kind(kind, found)["spec"]["template"]["spec"]["affinity"]

    required = "requiredDuringSchedulingIgnoredDuringExecution"
    own = {"topologyKey": "rack", "labelSelector": {"matchLabels": {"app": "store"}}}
    labels = {"name": "vqserve", "instance": "demo", "component": "engine"}
    selector = {"matchLabels": {f"app.kubernetes.io/{part}": text for part, text in labels.items()}}
    engine = {"topologyKey": "kubernetes.io/hostname", "labelSelector": selector}
    assert affinity("Job", "ReadWriteOnce")["podAffinity"] == {required: [own, engine]}
    assert affinity("Job", "ReadWriteOnce")["nodeAffinity"] == affinity("Deployment", "ReadWriteOnce")["nodeAffinity"]
    assert affinity("Job", "ReadWriteMany") == affinity("Deployment", "ReadWriteMany")
    assert affinity("Deployment", "ReadWriteOnce")["podAffinity"] == {required: [own]}


def test_the_sum_is_asked_by_the_file_that_is_linted() -> None:
    pod = of_kind("Pod", objects(rendered("--values", CHART / "ci" / "pvc-values.yaml")))
    [script] = pod["spec"]["containers"][0]["args"]
    assert ast.dump(ast.parse(script)) == ast.dump(ast.parse((CHART / "files/ask_a_sum.py").read_text("utf-8")))


def notes(tmp_path: Path, *arguments: str | Path) -> str:
    """What `helm install` would print: the chart with one more template that holds its notes."""
    chart = shutil.copytree(CHART, tmp_path / "chart")
    (chart / "templates" / "notes.yaml").write_text(
        'kind: Notes\ntext: {{ include (print .Template.BasePath "/NOTES.txt") . | toJson }}\n', encoding="utf-8"
    )
    text: str = of_kind("Notes", objects(rendered(*arguments, chart=chart)))["text"]
    return text


def test_the_notes_print_the_line_that_asks_the_model(tmp_path: Path) -> None:
    text = notes(tmp_path, "--values", CHART / "ci" / "cpu-demo-values.yaml")
    assert "curl http://127.0.0.1:8001/v1/chat/completions -H 'Content-Type: application/json' -d '{" in text
    assert "port-forward service/demo-vqserve 8001:80" in text
    assert "Authorization" not in text


@pytest.mark.parametrize(
    ("example", "tls", "scheme"),
    [
        ("ingress", "ingress.tlsSecretName=cert", "https"),
        ("ingress", "ingress.tlsSecretName=", "http"),
        ("route", "route.tls=true", "https"),
        ("route", "route.tls=false", "http"),
    ],
)
def test_the_notes_ask_by_the_name_that_is_routed_and_with_the_key(
    example: str, tls: str, scheme: str, tmp_path: Path
) -> None:
    text = notes(tmp_path, "--values", CHART / "ci" / f"{example}-values.yaml", "--set", tls)
    assert f"curl {scheme}://llm.example.com/v1/chat/completions" in text
    assert '-H "Authorization: Bearer $VLLM_API_KEY"' in text
    assert "port-forward" not in text


@pytest.mark.parametrize(
    ("hosts", "url"),
    [("{*.example.com}", "http://127.0.0.1:8001"), (r"{*.example.com,llm.example.com}", "https://llm.example.com")],
)
def test_the_notes_ask_no_name_that_stands_for_many(hosts: str, url: str, tmp_path: Path) -> None:
    text = notes(tmp_path, "--values", CHART / "ci" / "route-values.yaml", "--set", f"route.hostnames={hosts}")
    assert f"curl {url}/v1/chat/completions" in text


@each_example
def test_what_is_emptied_by_a_null_is_as_if_it_were_empty(values: Path, tmp_path: Path) -> None:
    nulls: dict[str, Any] = {}
    for path, default, _ in generate.leaves(Values(), ""):
        if isinstance(default, dict | list) and not path.endswith("accessModes"):
            *sections, name = path.split(".")
            place = nulls
            for section in sections:
                place = place.setdefault(section, {})
            place[name] = None
    # An example's own values come later, and so stay.
    assert ": null" not in notes(tmp_path, "--values", written(nulls, tmp_path), "--values", values)
    assert ": null" not in rendered("--values", written(nulls, tmp_path), "--values", values)


def engine_named(release: str) -> str:
    """What the engine's objects are called."""
    found = objects(rendered("--set", "model.pvc.claimName=glm", release=release))
    [name] = {item["metadata"]["name"] for item in found if item["kind"] in ("Deployment", "Service")}
    return str(name)


def test_a_releases_name_is_made_one_that_services_may_have() -> None:
    assert engine_named("glm-5.2") == "glm-5-2-vqserve"


def test_long_names_of_releases_do_not_become_the_same() -> None:
    one, other = engine_named(f"{'a' * 45}-one"), engine_named(f"{'a' * 45}-two")
    assert one != other
    assert len(one) == len(other) == 40


@pytest.mark.parametrize("word", ["123", "true"])
def test_a_name_that_looks_like_a_number_or_a_boolean_stays_text(word: str) -> None:
    texts = ["auth.existingSecret", "auth.key", "ingress.tlsSecretName", "ingress.className", "cache.storageClassName"]
    texts += ["scheduling.priorityClassName", "scheduling.runtimeClassName", "loadtest.resultsClaim"]
    texts += [
        "model.download.tokenSecret.name",
        "model.download.tokenSecret.key",
        "model.download.volume.storageClassName",
    ]
    sets = [f"--set-string={name}={word}" for name in texts]
    sets += [f"--set={name}.enabled=true" for name in ("ingress", "loadtest", "pdb", "networkPolicy")]
    sets += [
        "--set=model.source=download",
        "--set=model.download.url=https://models.example/glm",
        "--set=cache.kind=pvc",
    ]
    sets += ["--set=ingress.hosts={glm}", f"--set-string=fullnameOverride={'glm' if word.isdigit() else word}"]
    for item in objects(rendered(*sets, release=word)):
        kubernetes_validate.validate(item, MINORS[0], strict=True)
    claim = objects(rendered("--set-string", f"model.pvc.claimName={word}"))
    kubernetes_validate.validate(of_kind("Deployment", claim), MINORS[0], strict=True)


def test_a_single_replica_may_have_a_disruption_budget_that_lets_its_node_be_drained() -> None:
    found = objects(rendered("--values", BASE, "--set", "pdb.enabled=true"))
    assert of_kind("PodDisruptionBudget", found)["spec"]["maxUnavailable"] == 1


def test_labels_of_the_users_are_added_to_ours_and_none_that_selects_is_changed(tmp_path: Path) -> None:
    own = {"app.kubernetes.io/component": "mine", "app.kubernetes.io/version": "mine", "team": "a"}
    place = {"enabled": True, "labels": own}
    monitoring = {"serviceMonitor": place, "rules": place, "dashboards": place}
    values = {"model": {"pvc": {"claimName": "glm"}}, "podLabels": own, "monitoring": monitoring}
    text = rendered("--values", written(values, tmp_path))
    found = [item for item in objects(text) if item["kind"] in ("ConfigMap", "PrometheusRule", "ServiceMonitor")]
    labels = [item["metadata"]["labels"] for item in found]
    labels.append(of_kind("Deployment", objects(text))["spec"]["template"]["metadata"]["labels"])
    for each in labels:
        assert each["app.kubernetes.io/component"] in ("engine", "dashboard")
        assert (each["team"], each["app.kubernetes.io/version"]) == ("a", "mine")
    for document in text.split("\n---\n"):
        blocks = re.findall(r"^( *)labels:\n((?:\1 +.*\n)+)", document, re.MULTILINE)
        for _, block in blocks:
            keys = [line.partition(":")[0] for line in block.splitlines()]
            assert len(keys) == len(set(keys))


def test_other_pods_of_a_load_test_make_other_jobs_even_where_every_revision_is_the_first(tmp_path: Path) -> None:
    example = CHART / "ci" / "loadtest-values.yaml"

    def jobs(*arguments: str) -> set[str]:
        found = objects(rendered("--values", example, *arguments))
        return {item["metadata"]["name"] for item in found if item["kind"] == "Job"}

    name = "loadtest.profileToml"
    for other in (f"{name}=x", "loadtest.workers=3", "loadtest.slo=failures=0", "loadtest.nodeSelector.a=b"):
        assert not jobs() & jobs("--set", other)
    assert jobs() == jobs("--set", "replicaCount=2")
    assert all("-1-" in job for job in jobs())
    assert max(map(len, jobs("--set", f"fullnameOverride={'g' * 40}"))) <= 60  # of 63, for the revision's digits
    [report] = re.findall(r"job/(\S+) --container report", notes(tmp_path, "--values", example))
    assert report in jobs()


def test_a_profile_of_the_users_comes_as_it_is_written(tmp_path: Path) -> None:
    profile = '  description = "Sums"\n[traffic]\n'
    loadtest = {"enabled": True, "profileToml": profile}
    found = objects(
        rendered("--values", written({"model": {"pvc": {"claimName": "glm"}}, "loadtest": loadtest}, tmp_path))
    )
    assert of_kind("ConfigMap", found)["data"] == {"own.toml": profile}


def test_keda_shows_prometheus_who_asks_as_it_is_told() -> None:
    found = objects(rendered("--values", CHART / "ci" / "autoscaling-values.yaml"))
    [trigger] = of_kind("ScaledObject", found)["spec"]["triggers"]
    assert trigger["metadata"]["authModes"] == "bearer"
    assert trigger["authenticationRef"] == {"name": "prometheus"}


@pytest.mark.parametrize("kind", ["none", "hpa"])
def test_an_autoscaler_begins_with_the_replicas_that_there_are(kind: str, tmp_path: Path) -> None:
    chart = shutil.copytree(CHART, tmp_path / "chart")
    template = chart / "templates" / "deployment.yaml"
    asked = 'lookup "apps/v1" "Deployment" .Release.Namespace (include "vqserve.fullname" .)'
    text = template.read_text("utf-8")
    assert asked in text
    there = 'dict "spec" (dict "replicas" 3.0)'
    template.write_text(text.replace(asked, there), encoding="utf-8")
    found = objects(rendered("--values", BASE, "--set", f"autoscaling.kind={kind}", chart=chart))
    assert of_kind("Deployment", found)["spec"]["replicas"] == (3 if kind == "hpa" else 1)


@pytest.mark.parametrize(
    ("example", "says"),
    [
        ("pvc", "No PersistentVolumeClaim `glm-5.2-vq` was found in namespace llm (model.pvc.claimName)"),
        ("hostpath", "No PersistentVolumeClaim `vqserve-cache` was found in namespace llm (cache.existingClaim)"),
        ("ingress", "kubectl --namespace llm create secret generic vqserve-key --from-file api-key=FILE"),
        ("download", "No Secret `hub-token` was found in namespace llm (model.download.tokenSecret)"),
    ],
)
def test_the_notes_name_what_is_not_there(example: str, says: str, tmp_path: Path) -> None:
    assert says in notes(tmp_path, "--values", CHART / "ci" / f"{example}-values.yaml")


def test_the_examples_between_them_make_every_kind_of_object() -> None:
    made = {item["kind"] for values in CI for item in objects(rendered("--values", values))}
    texts = [path.read_text("utf-8") for path in (CHART / "templates").rglob("*.yaml")]
    assert made == set(re.findall(r"^kind: (\w+)$", "\n".join(texts), re.MULTILINE)) - {"HorizontalPodAutoscaler"}
    assert {api.rpartition("/")[2] for api in APIS} <= made


def test_the_autoscaler_of_kubernetes_renders(tmp_path: Path) -> None:
    values: dict[str, Any] = {"model": {"pvc": {"claimName": "glm"}}, "autoscaling": {"kind": "hpa"}}
    found = objects(rendered("--values", written(values, tmp_path)))
    scaler = of_kind("HorizontalPodAutoscaler", found)
    kubernetes_validate.validate(scaler, MINORS[0], strict=True)
    assert "replicas" not in of_kind("Deployment", found)["spec"]


def test_dashboards_come_as_they_are_for_grafanas_sidecar_to_find(tmp_path: Path) -> None:
    values = written(
        {
            "model": {"pvc": {"claimName": "glm"}},
            "monitoring": {"dashboards": {"enabled": True, "labels": {"team": "a"}, "annotations": {"folder": "b"}}},
        },
        tmp_path,
    )
    maps = [item for item in objects(rendered("--values", values)) if item["kind"] == "ConfigMap"]
    assert {key: text for item in maps for key, text in item["data"].items()} == {
        f"vqserve-{path.name}": path.read_text("utf-8") for path in (CHART / "files" / "dashboards").iterdir()
    }
    for item in maps:
        assert {"grafana_dashboard": "1", "team": "a"}.items() <= item["metadata"]["labels"].items()
        assert item["metadata"]["annotations"] == {"folder": "b"}
