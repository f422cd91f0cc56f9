"""Adapters in the forms that leave: merged, converted, held against their source, pushed."""
