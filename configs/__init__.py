"""Training recipes as YAML, one per model and data set: `striate train --config biformer/nano_fashion`."""
