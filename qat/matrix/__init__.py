"""The quality matrix: what FP4 costs on bases of two sizes, and what training against it gives back.

A design fixed beforehand (`design`), its jobs over the GPUs at hand (`schedule`, `worker`, `jobs`), what is measured
of every arm (`measure`, `play`, `probes`), and the table (`findings`, `table`). docs/quality_matrix.md says why.
"""
