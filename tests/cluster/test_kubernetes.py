"""The Kubernetes manifest is what the API takes, and says what spot machines and secrets need."""

from __future__ import annotations

import pytest
import yaml

from hpo.cluster import Pods, job_name, manifest
from hpo.errors import HpoError

PODS = Pods("registry.example/hpo:1", workers=8, cpus=2, memory="4Gi", gpus=1, secret="stores")  # noqa: S106 - its name


@pytest.fixture
def job(monkeypatch):
    monkeypatch.setenv("HPO_STORAGE", "postgresql://hpo:a-word@db/hpo")
    text = manifest("digits-mlp", PODS, options=["--trust"])
    assert "a-word" not in text
    return yaml.safe_load(text)


@pytest.mark.parametrize("version", ["1.29", "1.37"])
@pytest.mark.parametrize("pods", [PODS, Pods("hpo")])
def test_manifest_fits_the_schema_of_the_api(version, pods):
    validator = pytest.importorskip("kubernetes_validate")
    validator.validate(yaml.safe_load(manifest("digits-mlp", pods)), version, strict=True)


def test_each_worker_is_an_index_that_is_tried_again_by_itself(job):
    spec = job["spec"]
    assert (job["apiVersion"], job["kind"], spec["completionMode"]) == ("batch/v1", "Job", "Indexed")
    assert spec["completions"] == spec["parallelism"] == 8
    assert spec["backoffLimitPerIndex"] > 0
    assert "backoffLimit" not in spec
    # What a policy for failures and an Indexed Job's own limits ask for.
    assert spec["template"]["spec"]["restartPolicy"] == "Never"


def test_machine_that_is_taken_away_counts_as_no_failure_and_a_stopped_study_is_not_begun_again(job):
    first, second = job["spec"]["podFailurePolicy"]["rules"]
    assert first == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    assert second["action"] == "FailIndex"
    assert second["onExitCodes"]["containerName"] == job["spec"]["template"]["spec"]["containers"][0]["name"]
    assert second["onExitCodes"]["values"] == [130]


def test_pod_runs_a_worker_with_stores_from_the_secret_and_what_it_may_use(job):
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"] == ["hpo", "worker", "digits-mlp", "--trust"]
    assert container["image"] == PODS.image
    for name in ("HPO_STORAGE", "MLFLOW_TRACKING_URI"):
        assert {"name": name, "valueFrom": {"secretKeyRef": {"name": "stores", "key": name}}} in container["env"]
    amounts = {"cpu": "2", "memory": "4Gi", "nvidia.com/gpu": "1"}
    assert container["resources"] == {"requests": amounts, "limits": amounts}
    (volume,), (mount,) = pod["volumes"], container["volumeMounts"]
    assert volume["name"] == mount["name"]
    assert "emptyDir" in volume
    places = {each["name"]: each["value"] for each in container["env"] if "value" in each}
    assert set(places) == {"HPO_HOME", "HPO_DATA"}
    assert all(place.startswith(mount["mountPath"]) for place in places.values())
    assert pod["terminationGracePeriodSeconds"] >= 30


@pytest.mark.parametrize("study", ["digits-mlp", "My_Study.2", "x" * 80, "über-müde"])
def test_name_of_the_job_is_one_in_kubernetes(study):
    name = job_name(study)
    assert len(name) <= 52
    assert name.isascii()
    assert all(letter.isalnum() or letter == "-" for letter in name)
    assert name == name.lower().strip("-")


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"memory": "8 GB"}, "--memory 8 GB"),
        ({"scratch": "much"}, "--scratch much"),
        ({"secret": "My_Secret"}, "--secret My_Secret"),
        ({"image": "a b"}, "--image 'a b'"),
    ],
)
def test_what_kubernetes_would_not_take_is_told_at_once(change, place):
    with pytest.raises(HpoError, match=place):
        manifest("digits-mlp", Pods(**{"image": "hpo", **change}))
