"""Trained adapters: saved whole, opened again, asked questions."""
