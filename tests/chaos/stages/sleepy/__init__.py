"""A service whose stages only let time pass: a double for hours of training, with everything around it real.

What a ``dapt`` stage does is written in its book, a JSON object::

    {"steps": 20, "seconds": 0.02,       how long it takes
     "exit": "diverged", "at": 5,        how it ends, and at which step (``crash kill diverged refuse memory preempted busy``)
     "deaf": true,                       does not stop when asked to
     "silent": true,                     reports no progress
     "says": "text"}                     reports it as an event and in its result or error

It checkpoints every step and goes on from there, and appends ``[pid, monotonic time, step]`` to ``trace.jsonl`` in its workdir.
"""
