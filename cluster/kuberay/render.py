"""Fills the values of values.env into one of this folder's files and prints the YAML for kubectl.

    python cluster/kuberay/render.py raycluster.yaml NAMESPACE=research | kubectl apply -f -

A RayJob without a cluster gets the one of raycluster.yaml, so that there is one description of the cluster.
"""

from __future__ import annotations

import argparse
import string
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent


class _Plain(yaml.SafeDumper):
    """Writes what the files share by anchors out in full: kubectl's own tools need not know anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def read_values(path: Path, overrides: Sequence[str] = ()) -> dict[str, str]:
    """NAME -> value of a file of NAME=VALUE lines, and of the overrides.

    Raises:
        ValueError: an override that the file does not know, or a line without `=`.
    """
    lines = [
        line for line in path.read_text().splitlines() if line.strip() and not line.lstrip().startswith("#")
    ]
    values: dict[str, str] = {}
    for line in [*lines, *overrides]:
        name, equals, value = line.partition("=")
        if not equals:
            raise ValueError(f"{path.name}: '{line}' is no NAME=VALUE")
        if line in overrides and name not in values:
            raise ValueError(f"{path.name} has no value {name}; it has {', '.join(sorted(values))}")
        values[name] = value
    return values


def render(path: Path, values: Mapping[str, str]) -> list[dict[str, Any]]:
    """The documents of a file with its ${NAME}s replaced.

    Raises:
        KeyError: the file uses a name that has no value.
    """
    documents = list(yaml.safe_load_all(string.Template(path.read_text()).substitute(values)))
    for document in documents:
        spec = document.get("spec", {})
        if document["kind"] == "RayJob" and not spec.keys() & {"rayClusterSpec", "clusterSelector"}:
            spec["rayClusterSpec"] = render(HERE / "raycluster.yaml", values)[0]["spec"]
    return documents


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the rendered file; a wrong name is one line on stderr and exit code 2."""
    parser = argparse.ArgumentParser(
        description="Fills values into a KubeRay file and prints it for kubectl."
    )
    parser.add_argument("file", help="raycluster.yaml, rayjob.yaml or shared.yaml")
    parser.add_argument("overrides", nargs="*", metavar="NAME=VALUE")
    parser.add_argument("--values", type=Path, default=HERE / "values.env")
    options = parser.parse_args(arguments)
    try:
        documents = render(HERE / options.file, read_values(options.values, options.overrides))
    except (OSError, ValueError, KeyError) as error:
        print(f"render.py: {error}", file=sys.stderr)
        return 2
    yaml.dump_all(documents, sys.stdout, Dumper=_Plain, sort_keys=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
