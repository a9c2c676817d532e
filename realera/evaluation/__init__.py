"""Evaluation (Sec. 5): a task lists prompts, a scorer scores images, a report has the scores."""
