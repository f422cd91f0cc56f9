"""Adapters behind OpenAI's protocol."""
