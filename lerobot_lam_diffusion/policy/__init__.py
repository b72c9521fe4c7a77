"""Where the policy's tokens come from."""
