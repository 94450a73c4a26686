"""What the programs of train/ and infer/ share, and only they import: the one folder that may print and read clocks."""
