"""How much images keep to the concept and to the prompt: encoders, metrics, intervals, reports."""
