"""How fast attention is, beside dense attention and other MoBA packages. Nothing is timed that was not checked."""
