"""Judging how a served model behaves: cases, checks on replies, statistics over arms, and the gate.

Nothing here knows of training or torch: a suite file, an OpenAI-compatible endpoint and result files are all it takes.
"""
