"""Adapters scored on rows, in any form they may be deployed in."""
