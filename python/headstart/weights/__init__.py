"""A model's weights: packed linear layers, checkpoints of every format (`sources/`), and the writer of folders."""
