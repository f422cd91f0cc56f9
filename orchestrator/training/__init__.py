"""Train one trial: one LoRA adapter on one base model, recorded and resumable.

Reading order, from the entry points down. An import contract in `pyproject.toml` allows imports in this direction only.

    start          writes the folder of a new sweep: its data and its record
    trial          runs one trial in this process, from its configuration to `result.json`
    local          runs a sweep of one trial without Ray
    worker/        a worker process: its slots, and the threads that train the trials in them
    attempt/       one attempt at a trial: its events, and what is recorded of them
    engines/       the choice between trl's SFTTrainer and the fast engine, and the loop that both implement
    fast/          the fast engine: trains many adapters on one shared base
    model/         the base with a new adapter: its layers, first weights, precision and read-back
    questions      the prompts that a trial answers, and the metrics of its answers
    write_queue    the interface to whatever writes a trial's files
    finite         the check that ends a trial whose loss is not a number

Processes. Without Ray, `local` runs everything in the process of the command line. With Ray, the trial's process keeps
the records (`attempt.recorder`, driven by `sweep.workers`), and a worker process trains (`worker`). The events of
`attempt.events` are all that passes between the two.

Imports inside functions. torch, transformers, trl, peft and bitsandbytes take seconds to import. A module that the
command line, the driver or a recording process needs imports them inside the functions that use them, as `local` and
`model.device` do, or not at all, as `attempt.events` and `attempt.recorder`. Bad input is then reported before the
seconds of importing. Modules that only run where a trial trains import them at the top. trl is imported inside
functions there too, because a worker imports it in a thread while kernels compile (`engines.sft.import_trainer`).

Side effects on the process. Each is in one function: `local.take_gpus` hides GPUs, `model.device.use_device` sets the
number of CPU threads, `attempt.log_file.output_to` redirects the standard output, `engines.sft.import_trainer` replaces
two functions of accelerate, and `worker.garbage.freeze_garbage_collector` excludes long-lived objects from collections.
"""
