"""Rows, templates, split and tokens."""

from orchestrator.data.prepare import PreparedData, Prompt, load_or_prepare, prepare, save
from orchestrator.data.render import render_prompt

__all__ = ["PreparedData", "Prompt", "load_or_prepare", "prepare", "render_prompt", "save"]
