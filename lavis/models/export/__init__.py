"""A trained model in the format of a stock class of Transformers, proved by reloading it."""
