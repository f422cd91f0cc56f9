"""The two engines that train a trial, and the choice between them.

Reading order:

    check_targets   checks the layers that trials adapt before a sweep starts, from the base's configuration alone
    trial_inputs    what the trials of a process train on: base, tokenizer and rows
    loop            the `Loop` protocol, which both engines implement
    choose          picks the engine of a trial and opens its loop
    sft             the classic engine: trl's SFTTrainer with its own loop
    sampler         the order of rows in batches of similar length, for both engines
    loss_meter      per-row losses of SFTTrainer's evaluations

The other implementation of `Loop` is `fast.drive.slot.Slot`. Both build an SFTTrainer; the fast engine uses it for the
order of batches, the schedule, the callbacks and the state, but never runs its loop.

Everything here runs in the process that trains. A loop is opened where the trial is set up (in a worker, in the thread
`set-up`), and its steps run in the thread that trains. `sft` imports trl inside its functions, because that takes
seconds and a worker does it while kernels compile; see `sft.import_trainer`.
"""
