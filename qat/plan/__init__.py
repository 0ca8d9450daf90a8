"""Before the run: what a recipe will take in hours, memory and disk, estimated (`qat plan`) or rehearsed."""
