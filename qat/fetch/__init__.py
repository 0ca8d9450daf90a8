"""Getting the base: from the hub into its local cache, or from a folder that was carried here."""
