"""Rules and boards that watch a mesh, and the tools that make and try them."""
