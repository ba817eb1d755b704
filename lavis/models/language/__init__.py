"""Language models as parts: any causal one of Transformers."""
