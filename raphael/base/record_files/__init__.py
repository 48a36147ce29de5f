"""The files of encoded records: keys, shards, hashes; what is held in memory grows with shards, not with records."""
