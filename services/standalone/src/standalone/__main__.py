"""``python -m standalone`` is the ``parampara`` command."""

from standalone.cli import app

if __name__ == "__main__":
    app()
