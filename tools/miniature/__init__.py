"""The bundled model's making: drawings and captions in, the files of realera/miniature out."""
