"""One file per paper. Import algorithms through :mod:`fat_plugins.registry`, by name."""
