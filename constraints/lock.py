"""Writes constraints/cpu.txt and constraints/dev.txt: the exact versions that this environment holds.

    .venv/bin/python constraints/lock.py

cpu.txt pins the project's requirements with the extra `cpu` and all that they require in turn; dev.txt pins
what the extra `dev` adds to that. gpu.txt is written by hand: it needs a machine with a GPU to be tried.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HERE = Path(__file__).parent
# Removed after the install (setup.sh says why), so absent although required.
REMOVED = {"torchvision", "torchaudio", "torchcodec"}


def closure(requirements: Iterable[str]) -> dict[str, str]:
    """Name -> installed version of the requirements and of everything they require.

    Raises:
        SystemExit: a requirement that applies here is not installed.
    """
    versions: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    queue = [Requirement(text) for text in requirements]
    while queue:
        requirement = queue.pop()
        name = canonicalize_name(requirement.name)
        if name in REMOVED:
            continue
        try:
            dist = distribution(name)
        except PackageNotFoundError:
            raise SystemExit(f"{requirement} is not installed: run `make setup` first") from None
        versions[name] = dist.version
        for extra in {"", *requirement.extras}:
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            for text in dist.requires or []:
                child = Requirement(text)
                # A requirement without an extra's marker belongs to the extra "" alone.
                applies = child.marker is None or child.marker.evaluate({"extra": extra})
                if applies:
                    queue.append(child)
    return versions


def write(path: Path, title: str, versions: dict[str, str]) -> None:
    """One `name==version` a line, sorted, below a comment."""
    lines = [f"# {title}", "# Written by constraints/lock.py.", ""]
    lines += [f"{name}=={version}" for name, version in sorted(versions.items())]
    path.write_text("\n".join(lines) + "\n")
    print(f"{path.name}: {len(versions)} versions")


def main() -> None:
    """Locks the two files from pyproject.toml and the running environment."""
    project = tomllib.loads((HERE.parent / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    cpu = closure([*project["dependencies"], *extras["cpu"]])
    dev = {name: version for name, version in closure(extras["dev"]).items() if name not in cpu}
    write(HERE / "cpu.txt", "Everything that allo_ray[cpu] installs (Linux x86-64, Python 3.11).", cpu)
    write(HERE / "dev.txt", "What the extra `dev` adds to cpu.txt or gpu.txt.", dev)


if __name__ == "__main__":
    main()
