"""Rebuilds a full model from a base folder and sparse deltas, bit for bit.

allo export --base runs/quickstart/base --delta runs/quickstart/delta.safetensors --out my-model
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from jobs.cli import guarded


def main(arguments: list[str]) -> int:
    """Applies the deltas in the order given."""
    parser = argparse.ArgumentParser("allo export", description=__doc__)
    parser.add_argument(
        "--base", required=True, help="folder of the model that the first delta was made over"
    )
    parser.add_argument(
        "--delta", required=True, action="append", help="a delta file; several apply in order"
    )
    parser.add_argument("--out", required=True, help="folder to write; must not exist")
    told = parser.parse_args(arguments)

    from allo_ray.errors import UserError
    from allo_ray.models import check_folder
    from allo_ray.neurons.export import export

    out = Path(told.out)
    if out.exists():
        raise UserError(f"--out {out}: exists already, and nothing is overwritten. Give another folder.")
    export(check_folder(Path(told.base)), [Path(delta) for delta in told.delta], out)
    print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    sys.exit(guarded("jobs.export", sys.argv[1:]))
