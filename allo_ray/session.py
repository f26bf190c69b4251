"""The Ray cluster of a run: joined or started, with its chatter kept in files."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rich.console import Console

from allo_ray.config.run import ClusterConfig
from allo_ray.doctor import listening
from allo_ray.errors import UserError

#: Logical CPUs of a local cluster beyond the real ones: readers and writers that feed trainers and engines need
#: some, and a cluster whose CPUs all belong to consumers waits for ever without a word.
SPARE_CPUS = 4

#: What is said of a cluster, after its name, that refuses this client.
TOKEN_WANTED = (
    "asks for a token, and there is none here or another one: put the cluster's token into RAY_AUTH_TOKEN, or into a "
    "file named by RAY_AUTH_TOKEN_PATH, and set RAY_AUTH_MODE=token"
)

#: Set before torch, vLLM and DeepSpeed are imported anywhere in the cluster.
ENVIRONMENT = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "DEEPSPEED_LOG_LEVEL": "error",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    # The newer reader of Parquet starts an actor for file footers: 3 to 5 s more for every stage's few small files.
    "RAY_DATA_USE_DATASOURCE_V2": "0",
    # Ray's log monitor lists its folder once in 5 s, not ten times a second: nobody follows workers' logs here.
    "RAY_LOG_MONITOR_MANY_FILES_THRESHOLD": "0",
    "LOG_NAME_UPDATE_INTERVAL_S": "5",
    # Threads that wait for work sleep: so two programs share the same cores without slowing each other tenfold.
    "OMP_WAIT_POLICY": "PASSIVE",
}


def quiet() -> None:
    """Keeps libraries from talking over the progress lines; what they say of errors still shows."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"(ray|transformers|torch|deepspeed)\b.*")
    for name in ("ray", "ray.data", "ray.train", "ray.tune", "transformers", "DeepSpeed", "vllm", "filelock"):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def chatter_to(path: Path, stderr: bool = False) -> Iterator[Console]:
    """Sends all that this process prints to the file `path`, down to its C++ parts; yields a console for the user.

    The console writes where stdout (or stderr) went before, and is as wide and as colourful as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(1), os.dup(2)]
    terminal = os.fdopen(os.dup(2 if stderr else 1), "w", buffering=1)
    with path.open("ab", buffering=0) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    try:
        yield Console(file=terminal)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, old in enumerate(kept, start=1):
            os.dup2(old, number)
            os.close(old)
        terminal.close()


def start_local(**options: Any) -> None:
    """Starts a Ray cluster on this machine. Ray gives up after 30 s, which a busy machine may need: so three times."""
    import ray

    # Nobody takes this machine away: one process less for each stage that trains.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    for attempt in range(3):
        try:
            ray.init(include_dashboard=False, log_to_driver=False, **options)
            return
        except Exception as error:  # Ray raises this very class
            ray.shutdown()
            if "timed out during startup" not in str(error) or attempt == 2:
                raise


def _check_listening(address: str, named: str) -> None:
    """Raises UserError where no connection is taken: Ray itself tries for a minute, and then tells of its own parts."""
    parts = urlsplit(address if "://" in address else f"//{address}")
    try:
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise UserError(f"{named}: {error}. Write it as HOST:6379.") from None
    if host and port and not listening(host, port, timeout=5):
        raise UserError(
            f"{named}: nothing answers there. Is the cluster up, and does `ray status --address` answer? `auto` finds "
            "the cluster that runs on this machine; without an address one is started here."
        )


@contextmanager
def cluster(config: ClusterConfig, gpus_wanted: float = 0) -> Iterator[None]:
    """Joins the cluster that `config` or the environment names, or starts one on this machine for the time.

    Raises:
        UserError: nothing answers at the address, the token is missing or another one, or the cluster has no
            accelerator where the config asks for one.
    """
    quiet()
    import ray
    from ray.exceptions import AuthenticationError

    address = config.address or os.environ.get("RAY_ADDRESS")
    named = (
        f"{'cluster.address' if config.address else 'RAY_ADDRESS'} {address}" if address else "local cluster"
    )
    if address:
        _check_listening(address, named)
    try:
        if address:
            # Inside a submitted job its own runtime environment stays; without this Ray refuses names that both set.
            os.environ.setdefault("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")
            # Stages of a store behind a URL work in this folder, and other nodes have to open it too.
            cache = {name: os.environ[name] for name in ("ALLO_RAY_CACHE",) if name in os.environ}
            variables = {"env_vars": ENVIRONMENT | cache}
            ray.init(address=address, runtime_env=variables, log_to_driver=False, logging_level=logging.ERROR)
        else:
            cpus = config.num_cpus or (os.cpu_count() or 1) + SPARE_CPUS
            start_local(num_cpus=cpus, logging_level=logging.ERROR)
    except AuthenticationError:
        raise UserError(f"{named} {TOKEN_WANTED}") from None
    except (ConnectionError, ValueError, RuntimeError) as error:
        if "Version mismatch" in str(error):
            raise UserError(
                f"{named}: {' '.join(str(error).split())}. Use the cluster's own versions here, or send the job with "
                "`allo submit`, which runs it there."
            ) from None
        raise UserError(
            f"{named}: {str(error).splitlines()[0]}. Check that `ray status` answers there; a "
            "cluster with token authentication needs RAY_AUTH_MODE=token and the token."
        ) from None
    try:
        from ray.data import DataContext

        DataContext.get_current().enable_progress_bars = False
        DataContext.get_current().print_on_execution_start = False
        have = ray.cluster_resources().get("GPU", 0)
        if gpus_wanted > have and not address:
            raise UserError(
                f"the config asks for {gpus_wanted:g} GPU(s), this machine offers {have:g}. Set trainer.num_gpus and "
                "engine.pool.num_gpus to 0, or join a cluster that has them (cluster.address)."
            )
        yield
    finally:
        ray.shutdown()
