"""Model weights as files, a few rows at a time.

The one part of the shared code that needs torch: a service that imports it has torch among its own dependencies.
"""
