"""The networks of CoCosNet v2. Start reading at `cocosnet.py`."""
