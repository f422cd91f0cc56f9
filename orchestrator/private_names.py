"""The list of private names of other libraries that this project depends on.

It includes attributes that a subclass reads, methods that it overrides, and names that packages use in place.
`tests/unit/test_upstream.py` checks in a second, without importing the libraries, whether each name still exists with
the same parameters. After an upgrade: run it, and read the changed code before adapting an entry.
"""

from dataclasses import dataclass


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
    Private(_RAY, "ray/tune/tune.py", ("_setup_signal_catching()",), "upstream.py", "see keep_signal_handlers"),
    Private(
        _RAY, "ray/tune/execution/tune_controller.py",
        ("TuneController._checkpoint_manager", "TrialRunnerWrapper._tune_controller"),
        "upstream.py", "see limit_state_writing and write_state_next",
    ),
    Private(
        _RAY, "ray/tune/execution/experiment_state.py",
        ("_ExperimentCheckpointManager._update_auto_checkpoint_time(self, time_taken)", "_checkpoint_period"),
        "upstream.py", "see limit_state_writing and write_state_next",
    ),
    Private(
        _RAY, "ray/_private/services.py", ("resolve_ip_for_localhost(host)", "get_node_ip_address(address)"),
        "upstream.py", "see loopback_only",
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
    Private(
        _RAY, "ray/_private/state.py",
        ("actors(actor_id, job_id, actor_state_name)", "GlobalState.get_draining_nodes(self)"),
        "upstream.py", "see actor_state and draining_nodes",
    ),
    Private(_RAY, "ray/_private/node.py", ("Node.all_processes",), "upstream.py", "see local_ray_processes"),
    Private(_RAY, "ray/actor.py", ("ActorHandle._ray_actor_id",), "upstream.py", "see actor_state"),
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
        _RAY, f"{_TUNE}/execution/class_cache.py", ("ENV_VARS_TO_PROPAGATE",), "upstream.py", "see pass_on_no_keys"
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
         "BaseAcquisitionFunc.search_space", "LogEI._threshold", "qLogEI._threshold"),
        "sweep/search/models.py", "an expected improvement with a prior, and with beliefs about running trials",
    ),
    Private(
        "optuna 5.0", "optuna/_gp/search_space.py",
        ("SearchSpace.get_normalized_params(self, trials, trial_params)", "SearchSpace.is_categorical"),
        "sweep/search/models.py", "the prior's center in the coordinates of the model",
    ),
    Private(
        "optuna 5.0", "optuna/_gp/gp.py",
        ("GPRegressor.posterior(self, x, joint)", "GPRegressor.append_running_data(self, X_running, y_running)"),
        "sweep/search/models.py", "what the model expects at the point that it proposes, and of running trials",
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
        "torch 2.13", "torch/_C/_distributed_c10d.pyi",
        ("ProcessGroup._allgather_base(self, output, input, opts)",), "training/fast/shard/group.py",
        "gathers into one tensor in a group that is not the process's default one",
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
        "transformers 5.23", "transformers/generation/continuous_batching/cb_logits_processors.py",
        ("ContinuousBatchingLogitsProcessorList._retrieve_processors_kwargs(self)",), "deploy/serving/seeded.py",
        "the list collects the arguments of its processors once; one is added to it",
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
