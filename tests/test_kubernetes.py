"""launch/kubernetes.yaml: every field is in the published schemas, and its training starts."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import warm
import yaml
from program import ROOT

DOCUMENTS = list(yaml.safe_load_all((ROOT / "launch" / "kubernetes.yaml").read_text()))
MODELS = {
    "PersistentVolumeClaim": "IoK8sApiCoreV1PersistentVolumeClaim",
    "TrainingRuntime": "TrainerV1alpha1TrainingRuntime",
    "TrainJob": "TrainerV1alpha1TrainJob",
}


def one(kind):
    (found,) = [document for document in DOCUMENTS if document["kind"] == kind]
    return found


@pytest.mark.long
@pytest.mark.skipif(
    find_spec("kubeflow_trainer_api") is None,
    reason="the published schema is missing: pip install kubeflow-trainer-api",
)
@pytest.mark.parametrize("kind", MODELS)
def test_every_field_is_in_the_published_schema(kind):
    from kubeflow_trainer_api import models

    def plain(value):
        """Without the wrappers of quantities, and without what is empty."""
        if isinstance(value, dict):
            if set(value) == {"actual_instance"}:
                return plain(value["actual_instance"])
            return {key: plain(inner) for key, inner in value.items() if inner is not None}
        return [plain(inner) for inner in value] if isinstance(value, list) else value

    model = getattr(models, MODELS[kind])
    # the models drop fields that they do not know, and refuse wrong types
    assert plain(model.from_dict(one(kind)).to_dict()) == one(kind)


def test_the_documents_name_each_other():
    runtime, job, claim = one("TrainingRuntime"), one("TrainJob"), one("PersistentVolumeClaim")
    reference = job["spec"]["runtimeRef"]
    assert (reference["kind"], reference["name"]) == (runtime["kind"], runtime["metadata"]["name"])
    pod = runtime["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes["runs"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    (container,) = pod["containers"]
    assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
    assert container["workingDir"] in job["spec"]["trainer"]["command"][0]


def test_what_it_trains_is_right(tmp_path):
    program, *settings = one("TrainJob")["spec"]["trainer"]["args"][1:]
    settings = [setting.replace("/runs/", f"{tmp_path}/") for setting in settings]
    done = warm.launch(program, 1, "--check", *settings, modules=warm.TRAINING)
    assert done.returncode == 0, done.stderr
