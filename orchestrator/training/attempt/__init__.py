"""One attempt at a trial: from its base and last checkpoint to its last event.

A trial may take several attempts, for example after a lost worker. Reading order:

    events      what happens to a trial, as plain data; also `Listener`, who receives it
    attempt     `Attempt` trains one trial; `run_alone` drives one that has the process to itself
    reporter    a trainer callback that turns the trainer's callbacks into events, each after its files are written
    recorder    `TrialRecorder` turns events into the files of the trial's folder
    watcher     `Watcher` follows a local trial and may end it
    log_file    sends the output of libraries to the trial's log

Processes and threads. `attempt` and `reporter` run in the process that trains: in its main thread for a local trial, in
the thread `train` of a worker otherwise. In a worker a `writer` thread writes the files and then emits their events
(see `worker`). `recorder` runs in the process that keeps the records: the same one for a local trial, the trial's Ray
process otherwise. `events`, `recorder`, `watcher` and `log_file` import no ML library.
"""
