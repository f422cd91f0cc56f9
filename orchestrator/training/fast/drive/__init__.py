"""Runs trials in engines.

- `joint`: one engine for all slots, probed before it trains.
- `separate`: one engine a slot.
- `multi_lora`: steps many trials in turn.
- `slot`: drives one trial in its slot.
- `answers`: how the adapter in a slot answers a trial's questions.
- `slot_view`: a trial's LoRA matrices and optimizer state in its slot.
- `slot_settings`: the settings that a slot really holds.
"""
