"""Private names of other libraries that this project depends on.

Each library may rename such a name without notice. Calls from `sweep` and `cluster` go through the functions below;
`PRIVATE` lists all names, including attributes that a subclass reads, methods that it overrides, and the names that
other packages use in place. `tests/unit/test_upstream.py` checks in a second, without importing the libraries, whether
each name still exists with the same parameters. After an upgrade: run it, and read the changed code before adapting an
entry.

Libraries are imported inside the functions, so that this module is cheap to import.
"""

from collections.abc import Iterable, Iterator
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

TUNE_SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the orchestrator has its own trackers
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # `signals` handles SIGINT, and other signals too
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


@dataclass(frozen=True)
class Private:
    """Private names of one file of a library."""

    library: str
    """Distribution, and the version in which the names were seen."""
    file: str
    """Path below the folder of installed packages."""
    names: tuple[str, ...]
    """Each is `function(parameters)`, `variable`, `Class`, `Class.method(parameters)` or `Class.attribute`."""
    used_in: str
    """Module of this project, a path below `orchestrator/`."""
    why: str


_RAY, _TUNE = "ray 2.60", "ray/tune"
_BRACKETS, _GRID = "sweep/schedulers/brackets.py", "sweep/search/grid_random.py"

PRIVATE: tuple[Private, ...] = (
    # Ray
    Private(_RAY, "ray/_private/worker.py", ("_global_node",), "upstream.py", "see kill_ray_processes_at_shutdown"),
    Private(
        _RAY, "ray/_private/node.py", ("Node.kill_all_processes(self, check_alive, allow_graceful, wait)",),
        "upstream.py", "see kill_ray_processes_at_shutdown",
    ),
    Private(
        _RAY, "ray/_private/accelerators/nvidia_gpu.py",
        ("NvidiaGPUAcceleratorManager.get_current_process_visible_accelerator_ids()",
         "NvidiaGPUAcceleratorManager.get_current_node_num_accelerators()"),
        "upstream.py", "see num_visible_gpus",
    ),
    Private(
        _RAY, "ray/_private/state.py", ("GlobalState.get_max_resources_from_cluster_config(self)", "state"),
        "upstream.py", "see autoscaler_limits",
    ),
    Private(_RAY, "ray/actor.py", ("__ray_ready__(self)",), "upstream.py", "see when_ready"),
    Private(
        _RAY, "ray/train/_internal/session.py", ("_FutureTrainingResult",), "upstream.py",
        "see pending_checkpoint_type",
    ),
    # Ray Tune: the tuner, the controller and trials
    Private(_RAY, f"{_TUNE}/tuner.py", ("Tuner._local_tuner",), "upstream.py", "see replace_parts"),
    Private(
        _RAY, f"{_TUNE}/impl/tuner_internal.py", ("TunerInternal._tune_config", "TunerInternal._run_config"),
        "upstream.py", "see replace_parts",
    ),
    Private(
        _RAY, f"{_TUNE}/execution/tune_controller.py",
        ("TrialRunnerWrapper._tune_controller", "TuneController._schedule_trial_train(self, trial)",
         "TuneController._set_trial_status(self, trial, status)"),
        "upstream.py", "see continue_training and set_trial_status",
    ),
    Private(
        _RAY, f"{_TUNE}/experiment/trial.py", ("Trial.pickled_error_file(self)",), "upstream.py", "see error_file"
    ),
    Private(
        _RAY, f"{_TUNE}/experiment/trial.py", ("Trial.set_storage(self, new_storage)",), "sweep/tune_trial.py",
        "a moved sweep: the folder that the searcher's state holds is replaced",
    ),
    Private(
        _RAY, "ray/train/_internal/storage.py", ("StorageContext.experiment_driver_staging_path(self)",),
        "upstream.py", "see staging_folder",
    ),
    Private(
        _RAY, "ray/train/_internal/storage.py", ("StorageContext.storage_fs_path",), "sweep/tune_trial.py",
        "a moved sweep: the folder that the searcher's state holds is replaced",
    ),
    # Ray Tune: schedulers
    Private(
        _RAY, f"{_TUNE}/schedulers/trial_scheduler.py", ("TrialScheduler._supports_buffered_results",),
        "sweep/schedulers/conductor.py", "each report must be answered before the trial trains on",
    ),
    Private(
        _RAY, f"{_TUNE}/schedulers/hyperband.py",
        ("HyperBandScheduler._process_bracket(self, tune_controller, bracket)", "HyperBandScheduler._get_r0",
         "HyperBandScheduler._max_t_attr", "HyperBandScheduler._eta", "HyperBandScheduler._state",
         "HyperBandScheduler._trial_info"),
        _BRACKETS, "its faults are corrected in subclasses, see their docstrings",
    ),
    Private(
        _RAY, f"{_TUNE}/schedulers/hyperband.py",
        ("_Bracket._all_trials", "_Bracket._live_trials", "_Bracket._n", "_Bracket._n0", "_Bracket._cumul_r",
         "_Bracket._halves", "_Bracket.cur_iter_done(self)", "_Bracket.is_being_processed"),
        _BRACKETS, "its faults are corrected in subclasses, see their docstrings",
    ),
    Private(
        _RAY, f"{_TUNE}/schedulers/pbt.py",
        ("PopulationBasedTraining._exploit(self, tune_controller, trial, trial_to_clone)",
         "PopulationBasedTraining._trial_state", "_PBTTrialState.last_result"),
        "sweep/schedulers/population.py", "clones are recorded with the donor and its step",
    ),
    Private(
        _RAY, f"{_TUNE}/schedulers/pb2.py",
        ("PB2._save_trial_state(self, state, time, result, trial)", "PB2._get_new_config(self, trial, trial_to_clone)",
         "PB2._hyperparam_bounds", "PB2.current", "PB2.data"),
        "sweep/schedulers/pb2.py", "log axes are searched by the logarithm, and values are drawn where none is learned",
    ),
    # Search algorithms
    Private(
        "optuna 5.0", "optuna/samplers/_gp/sampler.py",
        ("GPSampler._optimize_acqf(self, acqf, best_params)", "GPSampler._gprs_cache_list"),
        "sweep/search/models.py", "a prior is added to the expected improvement, and the forecast at the point is read",
    ),
    Private(
        "optuna 5.0", "optuna/_gp/acqf.py",
        ("BaseAcquisitionFunc.eval_acqf(self, x)", "BaseAcquisitionFunc.length_scales",
         "BaseAcquisitionFunc.search_space"),
        "sweep/search/models.py", "an expected improvement with a prior is one of these",
    ),
    Private(
        "optuna 5.0", "optuna/_gp/search_space.py",
        ("SearchSpace.get_normalized_params(self, trials, trial_params)", "SearchSpace.is_categorical"),
        "sweep/search/models.py", "the prior's center in the coordinates of the model",
    ),
    Private(
        "optuna 5.0", "optuna/_gp/gp.py", ("GPRegressor.posterior(self, x, joint)",), "sweep/search/models.py",
        "what the model expects at the point that it proposes",
    ),
    Private(
        _RAY, f"{_TUNE}/search/basic_variant.py",
        ("BasicVariantGenerator._finished", "BasicVariantGenerator._live_trials",
         "BasicVariantGenerator._random_state", "BasicVariantGenerator._iterators",
         "BasicVariantGenerator._total_samples", "_TrialIterator.num_samples_left"),
        _GRID, "a resume may change the number of trials; a search ends only when no trial waits",
    ),
    Private(
        _RAY, f"{_TUNE}/search/optuna/optuna_search.py", ("OptunaSearch._ot_study", "OptunaSearch._ot_trials"),
        "sweep/search/optuna.py", "a point that was drawn before is discarded, and another one enqueued",
    ),
    Private(
        _RAY, f"{_TUNE}/search/hyperopt/hyperopt_search.py",
        ("HyperOptSearch._hpopt_trials", "HyperOptSearch._points_to_evaluate"),
        "sweep/search/hyperopt.py", "a point that was drawn before is discarded, and another one enqueued",
    ),
    Private(
        "hyperopt 0.3", "hyperopt/fmin.py", ("generate_trial(tid, space)",), "sweep/search/hyperopt.py",
        "a point is enqueued as Tune enqueues the points to try first",
    ),
    Private(
        _RAY, f"{_TUNE}/search/bohb/bohb_search.py",
        ("TuneBOHB.running", "TuneBOHB._points_to_evaluate", "TuneBOHB._max_concurrent"),
        "sweep/search/bohb.py", "a drawn point is discarded or enqueued; a resume may change the limit",
    ),
    # Libraries that other packages use
    Private(
        "ray 2.60", "ray/llm/_internal/serve/core/configs/llm_config.py", ("LLMConfig",),
        "deploy/export/ray_serve.py", "an exported configuration is validated without starting Ray Serve",
    ),
    Private(
        "torch 2.13", "torch/_utils.py", ("_unflatten_dense_tensors(flat, tensors)",),
        "training/fast/drive/slot_view.py", "one buffer is split into tensors in one call",
    ),
    Private(
        "torch 2.13", "torch/optim/lr_scheduler.py", ("LRScheduler._last_lr",), "training/model/readback.py",
        "the Trainer logs this learning rate",
    ),
    Private(
        "torch 2.13", "torch/optim/lr_scheduler.py", ("_opt_called",), "training/fast/drive/slot.py",
        "a schedule warns unless its optimizer has made a step, and here the engine makes the steps",
    ),
    Private(
        "torch 2.13", "torch/nn/modules/module.py", ("Module._forward_hooks",), "training/model/readback.py",
        "read-back looks for the hooks of the adapter's initialization",
    ),
    Private(
        "torch 2.13", "torch/nn/modules/module.py", ("Module._parameters", "Module._buffers"), "base.py",
        "copies of a base share the tensors of its modules",
    ),
    Private(
        "transformers 5.23", "transformers/trainer.py",
        ("Trainer._load_from_checkpoint(self, resume_from_checkpoint, model)",
         "Trainer._init_training_state(self, max_steps, num_update_steps_per_epoch, num_train_epochs,"
         " resume_from_checkpoint, trial)",
         "Trainer._load_optimizer_and_scheduler(self, checkpoint)", "Trainer._save_rng_state(self, output_dir)"),
        "training/fast/drive/slot.py", "a slot makes the steps of Trainer._inner_training_loop itself",
    ),
    Private(
        "transformers 5.23", "transformers/trainer.py",
        ("Trainer._prepare_inputs(self, inputs)", "Trainer._get_train_sampler(self, train_dataset)",
         "Trainer._get_eval_sampler(self, eval_dataset)"),
        "training/engines/sft.py", "rows are drawn by a sampler with its own random state",
    ),
    Private(
        "transformers 5.23", "transformers/models/llama/modeling_llama.py",
        ("LlamaRotaryEmbedding.max_seq_len_cached", "LlamaRotaryEmbedding.original_max_seq_len",
         "LlamaRotaryEmbedding.original_inv_freq"),
        "positions.py", "Dynamic NTK forgets the longest row of earlier batches",
    ),
    Private(
        "transformers 5.23", "transformers/conversion_mapping.py",
        ("get_model_conversion_mapping(model, key_mapping, hf_quantizer, add_legacy)",), "upstream.py",
        "see renamed_weights",
    ),
    Private(
        "transformers 5.23", "transformers/core_model_loading.py",
        ("WeightConverter", "WeightRenaming", "dot_natural_key(s)", "rename_source_key"), "upstream.py",
        "see renamed_weights",
    ),
    Private(
        "transformers 5.23", "transformers/modeling_utils.py", ("PreTrainedModel._get_dtype_plan(self, dtype)",
        "PreTrainedModel._is_stateful"), "upstream.py", "see float32_weights and keeps_state",
    ),
    Private(
        "transformers 5.23", "transformers/integrations/moe.py",
        ("_apply_gate", "ALL_EXPERTS_FUNCTIONS", "grouped_mm_experts_forward(self, hidden_states, top_k_index,"
         " top_k_weights)"),
        "experts.py", "packed experts are computed by an implementation of our own",
    ),
    Private(
        "transformers 5.23", "transformers/configuration_utils.py", ("_experts_implementation",),
        "experts.py", "tells whether the implementation was taken",
    ),
    Private(
        "transformers 5.23", "transformers/quantizers/quantizer_bnb_4bit.py",
        ("Bnb4BitHfQuantizer._process_model_after_weight_loading(self, model)",), "experts_quantizer.py",
        "experts are quantized while transformers loads a base",
    ),
    Private(
        "peft 0.21", "peft/tuners/lora/layer.py",
        ("ParamWrapper._activate_lora(self, active_adapters)",), "adapters/expert_updates.py",
        "the update of experts is applied to their inputs",
    ),
    Private(
        "accelerate 1.15", "accelerate/utils/imports.py", ("_is_package_available(pkg_name, metadata_name)",),
        "training/engines/sft.py", "its answer is cached: each trainer asks for it many times",
    ),
    Private(
        "accelerate 1.15", "accelerate/utils/other.py", ("has_compiled_regions(module)",),
        "training/engines/sft.py", "replaced: it looks at every module of a model, where only the outermost matters",
    ),
    Private(
        "bitsandbytes 0.50", "bitsandbytes/nn/modules.py", ("Linear4bit.support_avx512bf16_for_cpu",),
        "base_weights.py", "turned off: gradients of that CPU path are silently wrong (`Linear4bit.forward`)",
    ),
    Private(
        "bitsandbytes 0.50", "bitsandbytes/autograd/_functions.py",
        ("MatmulLtState.reset_grads(self)", "MatmulLtState.idx"), "base.py",
        "a copy of an 8-bit layer starts with an unused state",
    ),
    Private(
        "triton 3.9", "triton/runtime/_async_compile.py", ("FutureKernel",), "training/fast/ops/triton/launch.py",
        "kernels are compiled by several threads",
    ),
    Private(
        "wandb 0.31", "wandb/sdk/wandb_setup.py", ("_WandbSetup._connection",), "tracking/wandb.py",
        "the service is killed where wandb.teardown would wait forever",
    ),
    Private(
        "wandb 0.31", "wandb/sdk/lib/service/service_connection.py", ("ServiceConnection._proc",), "tracking/wandb.py",
        "the service is killed where wandb.teardown would wait forever",
    ),
    Private(
        "wandb 0.31", "wandb/sdk/lib/service/service_process.py", ("ServiceProcess._process",), "tracking/wandb.py",
        "the service is killed where wandb.teardown would wait forever",
    ),
)  # fmt: skip
