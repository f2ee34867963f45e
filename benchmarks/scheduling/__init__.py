"""What `benchmarks.scheduler` measures of placement."""
