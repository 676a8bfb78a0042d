"""What the two scripts call, one module for each station that a dialogue passes through."""
