"""What lies on the disk: the schema, the writer and the checks of a file, and the set of files of a run."""
