"""Regularization sets from image-text shards on local disks: find pictures whose captions mean what a query means."""
