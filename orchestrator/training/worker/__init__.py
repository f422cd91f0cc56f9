"""The worker process: it holds one base in memory, and trains the trials that are given its slots.

Reading order:

    slots           `SlotLease` is one trial's hold on a slot; `SlotPool` has all slots of the process
    file_writers    the threads that write files in the background
    inputs          the base, tokenizer and rows of the trials, loaded once
    compatibility   which trials of a sweep can share an engine, and the slots that they share
    runtime         `WorkerRuntime` ties these together; `sweep.workers.worker` wraps it in a Ray actor

Threads of a worker process:

    callers     any thread may call the public methods of `WorkerRuntime` (in a Ray actor, its method threads)
    train       loads the base, makes every training step, and runs the trials that cannot share an engine
    set-up      imports trl, then builds the trainers of new trials while others train
    writer      one for each attempt: writes its adapters and checkpoints, then emits the events that report them

Another process, which polls `WorkerRuntime.events`, writes the records of a trial.
"""
