"""Command-line tools: ``python -m lavis.tools.<name>``."""
