"""Control plane: files, runs, jobs, artifacts, deployments and keys over REST."""
