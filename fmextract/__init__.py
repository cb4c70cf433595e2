"""fmextract: the activations of a vision network, streamed to HDF5."""
