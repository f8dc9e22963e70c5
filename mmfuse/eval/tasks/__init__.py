"""Tasks: what is asked, in the file formats in which benchmarks are published, and the embedded suite."""
