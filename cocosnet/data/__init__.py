"""From picture files to tensors: decoding, conditions, extractors, prepared folders and training pairs."""
