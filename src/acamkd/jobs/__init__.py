"""What the commands do, one job each: a file, or a package. `setup` is what they all begin with."""
