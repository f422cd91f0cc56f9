"""The processes of a sweep that train, and the clients that talk to them.

Reading order, with the process in which each module runs:

- `fleet`: plans and starts the workers, in the driver. `placement`: a thread of the driver that reports what the sweep
  waits for.
- `worker`: the actor on each GPU, which holds the base model and trains several trials at a time.
- `trainable`: the trial as Tune sees it, a light actor for each running trial. It uses `attempt_client` (one attempt at
  the trial and its records; thread `attend` keeps its slot) and `worker_client` (a lease of a slot on a worker).

The driver uses `worker_client` too, to interrupt all workers.
"""
