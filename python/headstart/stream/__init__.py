"""Models larger than the memory that they may take: layers are read from their files ahead of every use."""
