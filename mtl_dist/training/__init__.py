"""The parts of the shipped training program `mtl_dist.train`. Nothing else in the library imports them."""
