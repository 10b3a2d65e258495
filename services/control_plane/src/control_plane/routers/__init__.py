"""Routes: they parse and answer; :mod:`control_plane.services` decides."""
