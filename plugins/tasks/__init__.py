"""The built-in tasks of `sinder evaluate`: a module each, found through entry points, as anyone's are."""

TRAINED = (  # what figures cannot see behind which a trained head stands
    "The interval is over the test images: another seed of training moves the figure too, and a head can learn to work"
    " around defects."
)
