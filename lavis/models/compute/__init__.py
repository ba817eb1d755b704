"""How a frozen model is run: attention, head, prefix, recomputation."""
