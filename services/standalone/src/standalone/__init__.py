"""The whole platform as one process tree, and the `parampara` command line."""
