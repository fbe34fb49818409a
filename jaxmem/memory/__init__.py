"""The blocks of memory; none imports a model, an adapter or another."""
