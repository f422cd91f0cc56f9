"""Forecast how trials end from their curves, their schedules and all other curves of the sweep.

Reading order: `rates` (learning rate of each step), `law` (the model of a curve), `posterior` (what curves say about
the law, and the forecast of each trial's last evaluation), `verdicts` (which trials stop, and the sentence for each),
`plans` (a trial's plan from its configuration), `calibration` (how often intervals held).
Nothing here keeps state: a decision follows from the curves. Derivation and sources: docs/forecast.md.
"""
