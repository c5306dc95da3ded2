"""A fixed context: a text that was read once, with its stored keys and values, and the cache for questions."""
