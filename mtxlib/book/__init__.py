"""The notebooks at work: run headless, many at once, on a cluster, as widgets; the `mtx` command."""
