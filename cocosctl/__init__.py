"""The command line of CoCosNet v2: parse, call the library `cocosnet`, print. Nothing here imports PyTorch at start."""
