"""What the tests of the plugin on SGLang's scheduler share."""
