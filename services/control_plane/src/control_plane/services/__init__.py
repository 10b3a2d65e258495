"""What the control plane decides. Functions take a session, never commit, and raise :mod:`parampara.errors`."""
