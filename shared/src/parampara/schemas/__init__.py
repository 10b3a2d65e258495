"""Pydantic models: recipes, stage configurations and results, and the bodies of the HTTP APIs."""
