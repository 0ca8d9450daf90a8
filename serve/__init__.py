"""Serving: vLLM in an environment of its own, started as a process, and its plugin for NVFP4 on CPU."""
