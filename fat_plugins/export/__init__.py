"""Exporters: they read deployed forms and know no algorithm and no host."""
