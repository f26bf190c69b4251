"""The KubeRay files against the fields of the operator's published resource definitions (ray.io/v1).

FIELDS holds the part of those definitions that these files touch: names and types as published for KubeRay 1.6. The
whole definitions are used as well where setup.sh could fetch them, or KUBERAY_CRDS=FOLDER names them
(ray-operator/config/crd/bases of a KubeRay checkout).
"""

from __future__ import annotations

import json
import os
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

KUBERAY = Path(__file__).resolve().parents[2] / "cluster" / "kuberay"
CRDS = Path(os.environ.get("KUBERAY_CRDS") or Path(sys.prefix) / "share" / "kuberay")

_spec = spec_from_file_location("render", KUBERAY / "render.py")
assert _spec
assert _spec.loader
render = module_from_spec(_spec)
_spec.loader.exec_module(render)

INTEGER, STRING, BOOLEAN, ANY = {"type": "integer"}, {"type": "string"}, {"type": "boolean"}, {}
TEXTS = {"type": "object", "additionalProperties": STRING}


def record(required: tuple[str, ...] = (), **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


def listed(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


QUANTITIES = record(requests=TEXTS, limits=TEXTS)
CONTAINER = record(
    required=("name", "image"),
    name=STRING,
    image=STRING,
    ports=listed(record(required=("containerPort",), name=STRING, containerPort=INTEGER)),
    env=listed(record(required=("name",), name=STRING, value=STRING)),
    resources=QUANTITIES,
    volumeMounts=listed(record(required=("name", "mountPath"), name=STRING, mountPath=STRING)),
)
POD = record(
    required=("spec",),
    spec=record(
        required=("containers",),
        containers=listed(CONTAINER),
        nodeSelector=TEXTS,
        priorityClassName=STRING,
        restartPolicy={"enum": ["Always", "OnFailure", "Never"]},
        terminationGracePeriodSeconds=INTEGER,
        tolerations=listed(record(key=STRING, operator=STRING, value=STRING, effect=STRING)),
        volumes=listed(
            record(
                required=("name",),
                name=STRING,
                persistentVolumeClaim=record(required=("claimName",), claimName=STRING),
                emptyDir=record(medium=STRING, sizeLimit=STRING),
            )
        ),
    ),
)
FIELDS = record(
    required=("headGroupSpec",),
    rayVersion=STRING,
    authOptions=record(mode={"enum": ["disabled", "token"]}, secretName=STRING, enableK8sTokenAuth=BOOLEAN),
    enableInTreeAutoscaling=BOOLEAN,
    autoscalerOptions=record(
        version={"enum": ["v1", "v2"]},
        upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
        idleTimeoutSeconds=INTEGER,
        resources=QUANTITIES,
    ),
    headGroupSpec=record(required=("template",), rayStartParams=TEXTS, template=POD),
    workerGroupSpecs=listed(
        record(
            required=("groupName", "minReplicas", "maxReplicas", "template"),
            groupName=STRING,
            replicas=INTEGER,
            minReplicas=INTEGER,
            maxReplicas=INTEGER,
            idleTimeoutSeconds=INTEGER,
            rayStartParams=TEXTS,
            template=POD,
        )
    ),
)
JOB_FIELDS = record(
    entrypoint=STRING,
    backoffLimit=INTEGER,
    activeDeadlineSeconds=INTEGER,
    shutdownAfterJobFinishes=BOOLEAN,
    ttlSecondsAfterFinished=INTEGER,
    runtimeEnvYAML=STRING,
    submitterPodTemplate=POD,
    rayClusterSpec=FIELDS,
)


def rendered(name: str, *overrides: str) -> list[dict[str, Any]]:
    return render.render(KUBERAY / name, render.read_values(KUBERAY / "values.env", overrides))


@pytest.mark.parametrize(
    ("name", "kind", "fields"),
    [("raycluster.yaml", "RayCluster", FIELDS), ("rayjob.yaml", "RayJob", JOB_FIELDS)],
)
def test_every_field_is_one_that_the_operator_knows(name: str, kind: str, fields: dict[str, Any]) -> None:
    (document,) = rendered(name)
    assert (document["apiVersion"], document["kind"]) == ("ray.io/v1", kind)
    jsonschema.validate(document["spec"], fields)


def strict(schema: Any) -> Any:
    """A published definition as JSON schema, with unknown fields as errors (the server would drop them)."""
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"anyOf": [INTEGER, STRING]}
    result = {key: value for key, value in schema.items() if not key.startswith("x-") and key != "format"}
    if "properties" in result:
        result["properties"] = {key: strict(value) for key, value in result["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            result["additionalProperties"] = False
    elif "additionalProperties" in result:
        result["additionalProperties"] = strict(result["additionalProperties"])
    if "items" in result:
        result["items"] = strict(result["items"])
    return result


@pytest.mark.skipif(
    not CRDS.is_dir(), reason="setup.sh could not fetch them; set KUBERAY_CRDS=ray-operator/config/crd/bases"
)
@pytest.mark.parametrize(
    ("name", "crd"), [("raycluster.yaml", "ray.io_rayclusters.yaml"), ("rayjob.yaml", "ray.io_rayjobs.yaml")]
)
def test_against_the_whole_published_definition(name: str, crd: str) -> None:
    text = (CRDS / crd).read_text()
    definition = yaml.load(text, Loader=yaml.CSafeLoader)  # a megabyte: minutes without libyaml
    (version,) = [version for version in definition["spec"]["versions"] if version["name"] == "v1"]
    schema = strict(version["schema"]["openAPIV3Schema"]["properties"]["spec"])
    (document,) = rendered(name)
    # Without a check of the definition itself, which is as long and taken as published.
    errors = jsonschema.Draft202012Validator(schema).iter_errors(document["spec"])
    assert [f"{error.json_path}: {error.message}" for error in errors] == []


def test_the_job_gets_the_cluster_of_the_one_description() -> None:
    (cluster,), (job,) = rendered("raycluster.yaml"), rendered("rayjob.yaml")
    assert job["spec"]["rayClusterSpec"] == cluster["spec"]


def test_the_groups_offer_their_own_resources() -> None:
    """Ray reads them from a JSON text inside quotes, as the operator hands them to a shell."""
    (cluster,) = rendered("raycluster.yaml", "TRAINER_GPU=8")
    offers = {
        group["groupName"]: json.loads(json.loads(group["rayStartParams"]["resources"]))
        for group in cluster["spec"]["workerGroupSpecs"]
    }
    assert offers == {"trainers": {"trainer": 8}, "samplers": {"sampler": 1}}


def test_every_value_is_used_and_every_use_has_a_value() -> None:
    values = render.read_values(KUBERAY / "values.env")
    texts = "".join(path.read_text() for path in KUBERAY.glob("*.yaml"))
    assert {name for name in values if f"${{{name}}}" not in texts} == set()
    for path in KUBERAY.glob("*.yaml"):
        rendered(path.name)


def test_mounts_name_volumes_of_their_pod() -> None:
    (cluster,) = rendered("raycluster.yaml")
    spec = cluster["spec"]
    for pod in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
        pod = pod["template"]["spec"]
        mounts = {mount["name"] for container in pod["containers"] for mount in container["volumeMounts"]}
        assert mounts == {volume["name"] for volume in pod["volumes"]}


def test_it_asks_for_a_token_and_for_what_it_may_use_and_workers_have_a_priority() -> None:
    (cluster,) = rendered("raycluster.yaml", "PRIORITY_CLASS=batch")
    spec = cluster["spec"]
    assert spec["authOptions"]["mode"] == "token"
    for pod in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
        for container in pod["template"]["spec"]["containers"]:
            assert container["resources"]["requests"] == container["resources"]["limits"]
            assert {"cpu", "memory"} <= set(container["resources"]["limits"])
    workers = [pod["template"]["spec"] for pod in spec["workerGroupSpecs"]]
    assert [pod["priorityClassName"] for pod in workers] == ["batch"] * 2
    assert all("nvidia.com/gpu" in pod["containers"][0]["resources"]["limits"] for pod in workers)


def test_an_unknown_value_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert render.main(["raycluster.yaml", "IMGE=x"]) == 2
    assert "has no value IMGE" in capsys.readouterr().err
