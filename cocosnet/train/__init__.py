"""Training: `trainer` runs it, `steps` is what is learned from one batch, `batches` is what a batch is."""
