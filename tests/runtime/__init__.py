"""The runtime: choosing tokens, generating text, running artifacts."""
