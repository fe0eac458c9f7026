"""A folder as Hugging Face has them: config, weights, and what comes before the model."""
