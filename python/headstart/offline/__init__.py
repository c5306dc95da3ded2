"""Work done ahead of time, and the artifacts that it leaves behind."""
