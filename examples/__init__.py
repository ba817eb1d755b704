"""Runnable examples; a package, so that no other one called so is found in its place."""
