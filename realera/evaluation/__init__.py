"""Does it work (Sec. 5)? A task lists the prompts, a judge says how far an image shows what was
wanted, a report holds the numbers."""
