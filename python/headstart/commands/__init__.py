"""The commands of `headstart` that Python can call too: one file each."""
