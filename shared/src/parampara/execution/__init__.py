"""The job protocol: the queue in Postgres, the worker that supervises stage processes, and the child side of it."""
