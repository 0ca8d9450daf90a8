"""Conversations and personas: reading, checking, rendering to tokens, auditing. Imports no torch."""
