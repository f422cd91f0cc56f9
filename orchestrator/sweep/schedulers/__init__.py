"""Which trials are stopped, paused or cloned, and when the sweep is over.

Everything here runs in the driver's main thread, in Tune's loop. A resume restores its state from the snapshot.

Reading order: `conductor` (the scheduler that Tune asks), `factory` (makes the scheduler that decides), `together` (a
rule that judges the reports of one moment together), `asha`, `median`, `forecast_rule` and its package `forecast`,
`decisions` (the sentences that are recorded), `budget`, `report_queue` and `report_order` (in which order rules see
reports), `scheduler_state` (state as bytes), and the corrected Tune schedulers: `brackets` (HyperBand and BOHB),
`population` (PBT) and `pb2` (extra `pb2`, imported only where the experiment asks for it). `stuck` gives a sweep up in
which no trial can go on.
"""
