"""Between student and teacher: taps, losses, weights, and what watches over them."""
