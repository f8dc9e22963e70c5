"""Work on data sets as a whole: writing them as shards, checking them, counting them."""
