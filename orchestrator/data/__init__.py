"""Rows, templates, split and tokens."""

from orchestrator.data.encode import encode_prompt
from orchestrator.data.prepare import PreparedData, Prompt, load, prepare, save
from orchestrator.data.render import render_prompt

__all__ = ["PreparedData", "Prompt", "encode_prompt", "load", "prepare", "render_prompt", "save"]
