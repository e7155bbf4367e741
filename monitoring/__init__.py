"""What watches a mesh: rules and boards, and the tools that make and try them."""
