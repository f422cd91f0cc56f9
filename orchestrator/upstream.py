"""Calls of private names of other libraries.

Each library may rename such a name without notice. Calls from `sweep` and `cluster` go through the functions below;
`private_names` lists all names, also those that other packages use in place.

Libraries are imported inside the functions, so that this module is cheap to import.
"""

import importlib
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONNECTION_ATTEMPTS_VARIABLE = "RAY_gcs_server_port_wait_time_s"
"""Environment variable with the number of attempts to connect to a cluster (ray 2.60, `Node._init_gcs_client`)."""

TUNE_STATE_FILES = (
    "experiment_state-*.json",
    "search_gen_state-*.json",
    "searcher-state-*.pkl",
    "basic-variant-state-*.json",
)
"""Patterns of the files of Tune's state (ray 2.60, `CKPT_FILE_TMPL` of four classes): a snapshot must hold them all."""

TUNE_PICKLES = ("*.json", "*.pkl", "*/**/*.pkl")
"""Patterns of all files in Tune's folder that it may unpickle (ray 2.60): its state, which is pickled in the JSON files
too, `callback-states-*.pkl`, `tuner.pkl`, and in the folders of trials their errors and checkpoints."""

TUNE_SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the orchestrator has its own trackers
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # the new output prints a table even at verbosity 0
}
"""Environment variables that have no argument in Tune's interface (ray 2.60)."""


def kill_ray_processes_at_shutdown() -> None:
    """Have `ray.shutdown` end Ray's own processes by SIGKILL, if this process has started them.

    Ray would send SIGTERM and wait a second for each. They ignore SIGTERM here, and hold nothing that outlives the
    sweep. ray 2.60: `shutdown` has no argument for it.
    """
    from ray._private import worker

    node = worker._global_node
    if node is not None:
        kill = node.kill_all_processes
        node.kill_all_processes = lambda **_: kill(check_alive=False, allow_graceful=False)


def keep_signal_handlers() -> None:
    """Let Tune set no signal handlers in this process: `signals` handles them.

    ray 2.60: an environment variable turns off the handler of SIGINT, but nothing that of SIGUSR1.
    """
    module = importlib.import_module("ray.tune.tune")
    module._setup_signal_catching = threading.Event  # type: ignore[attr-defined]


def pass_on_no_keys() -> None:
    """Let Tune pass no keys of AWS to trainables: they would stand on a command line, which every user can read.

    ray 2.60: the actors' class takes them from the driver's environment, and no option turns it off. Trainables have
    the environment of their node.
    """
    passed_on: set[str] = importlib.import_module("ray.tune.execution.class_cache").ENV_VARS_TO_PROPAGATE
    passed_on.difference_update([name for name in passed_on if name.startswith("AWS_")])


def limit_state_writing(
    controller: Any, free_s: float, max_share: float, longest_s: float, written: Callable[[], None]
) -> None:
    """Let Tune write its state less often where that takes longer: with 1,000 trials, 0.1 s at each turn.

    ray 2.60: the manager of the state calls `_update_auto_checkpoint_time` after each writing. Its own rule waits at
    least 10 s.

    Args:
        controller: what Tune gives its scheduler.
        free_s: seconds of a writing that need no pause after it.
        max_share: largest share of the time that goes into writing beyond that.
        longest_s: longest pause in seconds, such as after a disk that was slow once.
        written: called after each writing.
    """
    manager = controller._tune_controller._checkpoint_manager  # a scheduler is given a wrapper

    def adapt(time_taken: float) -> None:
        manager._checkpoint_period = min(max(0.0, time_taken - free_s) * (1 / max_share - 1), longest_s)
        written()

    manager._update_auto_checkpoint_time = adapt


def write_state_next(controller: Any) -> None:
    """Have Tune write its state at the end of this turn, whatever `limit_state_writing` would do (ray 2.60)."""
    controller._tune_controller._checkpoint_manager._checkpoint_period = 0.0


@contextmanager
def loopback_only() -> Iterator[str]:
    """Let a Ray that starts within the block listen on the loopback interface only; yield the address to give it.

    ray 2.60: its servers listen there alone if the node's address is 127.0.0.1 (`GrpcServer`), but `ray.init` replaces
    this address by that of the machine (`resolve_ip_for_localhost`).
    """
    from ray._private import services

    address = "127.0.0.1"
    before = services.resolve_ip_for_localhost, services.get_node_ip_address
    services.resolve_ip_for_localhost = lambda host: host
    services.get_node_ip_address = lambda *_, **__: address
    try:
        yield address
    finally:
        services.resolve_ip_for_localhost, services.get_node_ip_address = before


def num_visible_gpus() -> int:
    """Return the GPUs of this machine that this process may use, as Ray counts them.

    ray 2.60: the public functions need a running Ray; torch would initialize CUDA in this process.
    """
    from ray._private.accelerators.nvidia_gpu import NvidiaGPUAcceleratorManager as Nvidia

    visible = Nvidia.get_current_process_visible_accelerator_ids()
    num_gpus: int = Nvidia.get_current_node_num_accelerators()
    return num_gpus if visible is None else min(num_gpus, len(visible))


def autoscaler_limits() -> dict[str, int]:
    """Return the resources of the cluster once its autoscaler has started all it may; empty without an autoscaler.

    ray 2.60: no public function returns it.
    """
    import ray

    return ray._private.state.state.get_max_resources_from_cluster_config() or {}


@dataclass(frozen=True)
class ActorState:
    """What Ray's table of actors says about one actor."""

    state: str
    """Such as ALIVE, RESTARTING or DEAD."""
    num_restarts: int
    pid: int
    """Process of the actor; 0 before it has started."""
    node_id: str
    cause: str
    """Ray's text about its last death; empty before the first."""


def actor_state(actor: Any) -> ActorState | None:
    """Return the state of an actor; None if Ray does not know it yet.

    ray 2.60: `ray.util.state` asks the dashboard, which a local Ray does not run here.
    """
    import ray

    row = ray._private.state.actors(actor._ray_actor_id.hex())
    if not row:
        return None
    cause = row["DeathCause"]
    kind = cause.WhichOneof("context")
    context = getattr(cause, kind) if kind else None
    text = str(getattr(context, "error_message", "") or context or "")
    if kind == "oom_context":
        text = f"low on memory: {text}"
    return ActorState(row["State"], row["NumRestarts"], row["Pid"], row["Address"]["NodeID"], text)


def draining_nodes() -> set[str]:
    """Return the ids of nodes that are being drained, for example before a preemption (ray 2.60, `ray drain-node`)."""
    import ray

    return set(ray._private.state.state.get_draining_nodes())


def local_ray_processes() -> list[tuple[str, Any]]:
    """Return raylet and GCS of the Ray that this process has started, as (name, `Popen`) (ray 2.60)."""
    from ray._private import worker

    node = worker._global_node
    kinds = {"raylet": "raylet", "gcs_server": "GCS"}
    running = {} if node is None else node.all_processes
    return [(name, info.process) for kind, name in kinds.items() for info in running.get(kind, [])]


def when_ready(actor: Any) -> Any:
    """Return a reference that resolves once an actor runs (ray 2.60: every actor has this method)."""
    return actor.__ray_ready__.remote()


def replace_parts(tuner: Any, search_alg: Any, scheduler: Any, callbacks: list[Any]) -> None:
    """Replace searcher, scheduler and callbacks of a restored tuner (ray 2.60: `Tuner.restore` takes none of them)."""
    internal = tuner._local_tuner
    internal._tune_config.search_alg = search_alg
    internal._tune_config.scheduler = scheduler
    internal._run_config.callbacks = callbacks


def continue_training(controller: Any, trial: Any) -> None:
    """Have a trial train on whose report was answered with NOOP.

    ray 2.60: the wrapper of the controller that Tune passes to schedulers has no public method for it.
    """
    controller._tune_controller._schedule_trial_train(trial)


def set_trial_status(controller: Any, trial: Any, status: str) -> None:
    """Set the status of a trial that Tune knows, so that the controller's own lists follow (ray 2.60)."""
    controller._set_trial_status(trial, status)


def error_file(trial: Any) -> Path | None:
    """Return the file with the pickled error of a Tune trial's last attempt (ray 2.60, `Trial.handle_error`)."""
    file = trial.pickled_error_file
    return None if file is None else Path(file)


def staging_folder(trial: Any) -> Path:
    """Return the folder on this machine in which Tune writes its state before it copies it (ray 2.60)."""
    return Path(trial.storage.experiment_driver_staging_path)


def pending_checkpoint_type() -> type:
    """Return the class of a checkpoint that is being written, which PBT keeps in its state (ray 2.60)."""
    from ray.train._internal.session import _FutureTrainingResult

    return _FutureTrainingResult  # type: ignore[no-any-return]


def names_in_model(model: Any, stored: Iterable[str]) -> dict[str, str | None]:
    """Map the names of stored weights to their names in a model, as `from_pretrained` does.

    Args:
        model: a model; it may be on the meta device.
        stored: names in the model's files.

    Returns:
        For each name, the name in the model. It may be one that the model does not have: transformers ignores such
        weights. None for a weight that transformers computes from others while it loads.
    """
    return {name: None if converter else renamed for name, renamed, _, converter in renamed_weights(model, stored)}


def renamed_weights(model: Any, stored: Iterable[str]) -> Iterator[tuple[str, str, str | None, Any]]:
    """Yield stored names, with their name in the model; a converted one with its pattern and `WeightConverter`.

    transformers 5.23: `convert_and_load_state_dict_in_model` does this for files that it loads, but not alone.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    weights, prefix = model.state_dict(), model.base_model_prefix
    for name in sorted(stored, key=dot_natural_key):  # some renamings depend on the order
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, weights)
        if renamed not in weights and name in weights:
            renamed, pattern = rename_source_key(name, [], [], prefix, weights)
        yield name, renamed, pattern, by_pattern.get(pattern)


def float32_weights(model: Any, dtype: Any) -> tuple[str, ...]:
    """Return parts of the names of weights that stay in float32 when the model is loaded in `dtype`.

    transformers 5.23: `from_pretrained` respects them, but not for files with quantized weights.
    """
    return tuple(model._get_dtype_plan(dtype))


def keeps_state(model: Any) -> bool:
    """Return whether layers of a model keep a state between tokens instead of keys and values, as Mamba's do.

    transformers 5.23: no public attribute tells it.
    """
    return bool(getattr(model, "_is_stateful", False))
