"""Files of weights: what is frozen is mapped, what is trained is kept."""
