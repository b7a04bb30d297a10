"""Families of algorithms: each trains the top adapter of a policy and knows nothing of recipes."""
