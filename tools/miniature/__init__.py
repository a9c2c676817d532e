"""Training of the bundled models: from drawings and captions to the files of realera/miniature."""
