"""The commands of `qat`, a module a group; heavy imports stand inside the functions."""
