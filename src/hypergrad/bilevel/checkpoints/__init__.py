"""Where a loop is written and read: one file, or one folder of the files of all ranks."""
