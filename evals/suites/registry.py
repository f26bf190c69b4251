"""Suites by name."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from allo_ray.config.data import SuiteConfig
from allo_ray.errors import UserError
from evals.suites.arithmetic import Arithmetic
from evals.suites.base import Suite
from evals.suites.instructions import AlpacaEval, ArenaHard
from evals.suites.mathematics import GSM8K, MATH, MAWPS, TabMWP
from evals.suites.questions import ECQA, QASC, OpenBookQA, StrategyQA
from evals.suites.transfer import Transfer

_SUITES: tuple[type[Any], ...] = (
    Arithmetic,
    Transfer,
    ECQA,
    QASC,
    OpenBookQA,
    StrategyQA,
    GSM8K,
    MATH,
    MAWPS,
    TabMWP,
    AlpacaEval,
    ArenaHard,
)
SUITES: dict[str, type[Any]] = {suite.name: suite for suite in _SUITES}


def load_suite(config: SuiteConfig) -> Suite:
    """The suite that a config names.

    Raises:
        UserError: no suite has that name, it takes no such argument, or it needs a path.
    """
    return build_suite(config.name, config.path, config.args)


def build_suite(name: str, path: str | None = None, args: dict[str, Any] | None = None) -> Suite:
    """See `load_suite`; `path` is the file, folder or hub name of a suite that reads one."""
    if name not in SUITES:
        raise UserError(f"suite {name!r} is not known; there are {', '.join(sorted(SUITES))}")
    kind = SUITES[name]
    names = [item.name for item in fields(kind)]
    values = dict(args or {})
    if path is not None:
        values["path"] = path
    unknown = sorted(set(values) - set(names))
    if unknown:
        raise UserError(f"suite {name}: unknown argument {unknown[0]!r}; it takes {', '.join(names)}")
    if "path" in names and "path" not in values:
        raise UserError(f"suite {name}: needs `path`, the file, folder or hub name of the set")
    try:
        return kind(**values)
    except TypeError as error:
        raise UserError(f"suite {name}: {error}") from None
