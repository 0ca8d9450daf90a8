"""Recipes: schema, checks, loading and the shipped library."""
