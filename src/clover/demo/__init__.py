"""The whole recipe, small and real: what `make demo` runs."""
