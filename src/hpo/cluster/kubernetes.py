"""Workers of a study as a Kubernetes Job, printed for a person to apply."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hpo.errors import HpoError

_SIZE = re.compile(r"[0-9]+(\.[0-9]+)?([EPTGM]i?|Ki|k)?")
_NAME = re.compile(r"[a-z0-9]([-.a-z0-9]*[a-z0-9])?")
_LONGEST = 50  # letters of a Job's name: pods add an index and five letters, and have at most 63
_GRACE = 60  # seconds in which a worker stops its trials
_RETRIES = 6


@dataclass(frozen=True)
class Pods:
    """The number of pods, their image, and the resources of each; sizes as Kubernetes writes them.

    secret is the name of the Secret that holds HPO_STORAGE and MLFLOW_TRACKING_URI.
    """

    image: str
    workers: int = 4
    cpus: int = 4
    memory: str = "8Gi"
    gpus: int = 0
    scratch: str = "20Gi"
    secret: str = "hpo-stores"  # noqa: S105 - its name

    def check(self) -> Pods:
        """Returns itself. Raises HpoError for what Kubernetes would refuse."""
        for option, size in (("--memory", self.memory), ("--scratch", self.scratch)):
            if not _SIZE.fullmatch(size):
                raise HpoError(
                    f"{option} {size}: is not an amount of bytes.", "Write it as Kubernetes does: 8Gi, 500Mi"
                )
        if not _NAME.fullmatch(self.secret):
            raise HpoError(
                f"--secret {self.secret}: is not a name in Kubernetes.", "Use small letters, digits, - and ."
            )
        if not self.image or re.search(r"\s", self.image):
            raise HpoError(f"--image {self.image!r}: is not the name of an image.", "Write REGISTRY/NAME:TAG")
        return self


def manifest(study: str, pods: Pods, *, options: Sequence[str] = ()) -> str:
    """YAML of a Job of `hpo worker`, options included, with comments on how to use it. Raises HpoError."""
    import yaml

    comments = [
        f"Workers of the study {study}. Once, before: hpo begin {study}, from wherever the storage is reached.",
        f"The Secret {pods.secret} holds HPO_STORAGE and MLFLOW_TRACKING_URI; stores.env has one NAME=VALUE a line:",
        f"kubectl create secret generic {pods.secret} --from-env-file=stores.env",
    ]
    body = yaml.safe_dump(_job(study, pods.check(), options), sort_keys=False, width=120)
    return "".join(f"# {line}\n" for line in comments) + body


def _job(study: str, pods: Pods, options: Sequence[str]) -> dict[str, Any]:
    """The Job, as the API batch/v1 takes it (Kubernetes 1.29 and later)."""
    amounts = {"cpu": str(pods.cpus), "memory": pods.memory}
    if pods.gpus:
        amounts["nvidia.com/gpu"] = str(pods.gpus)
    stores = [
        {"name": name, "valueFrom": {"secretKeyRef": {"name": pods.secret, "key": name}}}
        for name in ("HPO_STORAGE", "MLFLOW_TRACKING_URI")
    ]
    folders = [{"name": "HPO_HOME", "value": "/scratch/home"}, {"name": "HPO_DATA", "value": "/scratch/data"}]
    container = {
        "name": "worker",
        "image": pods.image,
        "command": ["hpo", "worker", study, *options],
        "env": [*stores, *folders],
        # It requests its limits: pods that use more than they requested are evicted first.
        "resources": {"requests": dict(amounts), "limits": dict(amounts)},
        "volumeMounts": [{"name": "scratch", "mountPath": "/scratch"}],
    }
    # A spot machine that is taken away counts as no failure. After `hpo stop` (exit code 130) pods are not restarted.
    # Other failures may come from a store that is unavailable: they are tried again, later each time.
    rules = [
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {"action": "FailIndex", "onExitCodes": {"containerName": "worker", "operator": "In", "values": [130]}},
    ]
    labels = {"app.kubernetes.io/name": "hpo", "app.kubernetes.io/component": "worker"}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": job_name(study), "labels": dict(labels)},
        "spec": {
            "completionMode": "Indexed",
            "completions": pods.workers,
            "parallelism": pods.workers,
            "backoffLimitPerIndex": _RETRIES,
            "podFailurePolicy": {"rules": rules},
            "template": {
                "metadata": {"labels": dict(labels)},
                "spec": {
                    "restartPolicy": "Never",
                    "terminationGracePeriodSeconds": _GRACE,
                    "automountServiceAccountToken": False,
                    "containers": [container],
                    "volumes": [{"name": "scratch", "emptyDir": {"sizeLimit": pods.scratch}}],
                },
            },
        },
    }


def job_name(study: str) -> str:
    """The Job's name: hpo- and the study's name, in the letters that Kubernetes allows."""
    return f"hpo-{re.sub('[^a-z0-9]+', '-', study.lower())}"[:_LONGEST].strip("-")
