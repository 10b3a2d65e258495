"""The demo: the main job on this machine, from base model to cited answers, with a report."""
