"""Rematerialisation policies of the literature, each a file written against `minifuse.remat` alone.

An instance is given to torch.compile: `options={"remat": DTRGreedy(), "memory_budget": 0.5}`.
"""
