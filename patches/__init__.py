"""Repairs of defects in the libraries on the way: one file each, applied in process where the defect is present."""
