"""``atserving top``: what the mesh does now, from the metrics of its processes."""
