"""What you would use instead: scripts with stock Ray Tune, as its documentation shows them."""
