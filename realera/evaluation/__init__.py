"""Evaluation (Sec. 5): a task lists the prompts, a scorer scores the images, a report holds the
scores."""
