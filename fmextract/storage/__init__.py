"""What lies on the disk: the schema of a file; in time its writer, its checks and the set of files of a run."""
