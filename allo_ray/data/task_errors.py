"""Errors of the user's that come up inside Ray tasks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import ray.data
from ray.exceptions import RayTaskError

from allo_ray.errors import UserError

#: Begins what Ray Data adds to the error's own text.
_RETRIES = "\nFailed to apply UDF transform"


@contextmanager
def users_error(rows: ray.data.Dataset | None = None) -> Iterator[None]:
    """A UserError of a task whose result is asked for in this block comes out as it was raised there.

    `rows`: the dataset that is computed in the block, where it is one.
    """
    if rows is not None:
        rows.context.raise_original_map_exception = True
    try:
        yield
    except RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise UserError(str(error.cause).partition(_RETRIES)[0]) from None
        raise
