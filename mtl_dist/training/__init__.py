"""Settings and parts of the training program `mtl_dist.train`. Nothing else in the library imports them."""
