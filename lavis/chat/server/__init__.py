"""The chat engine behind OpenAI's chat completions."""
