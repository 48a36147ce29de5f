"""Stage `download`: links to webdataset shards, by img2dataset behind the gateway."""
