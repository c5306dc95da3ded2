"""The commands behind `headstart`, one file each."""
