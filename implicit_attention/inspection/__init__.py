"""What looks at a layer: diagnostics and plots."""
